"""The checks of notebook 06 pass what is right, however it is written, and name each typical mistake."""

import pytest
import torch

from workbench.exercises import check_absorbed_scores, check_cached_elements


def counted(c):
    return (c.kv_lora_rank + c.qk_rope_head_dim) * c.num_hidden_layers


def test_a_right_count_is_solved():
    feedback = check_cached_elements(counted)
    assert feedback.passed and "V2-Lite" in feedback.text


@pytest.mark.parametrize(
    ("attempt", "says"),
    [
        (lambda c: None, "returned nothing"),
        (lambda c: ..., "returned nothing"),
        (lambda c: float(counted(c)), "A whole number is expected"),
        (lambda c: True, "A whole number is expected"),
        (lambda c: c.latent_width, "that is one layer"),
        (lambda c: c.kv_lora_rank * c.num_hidden_layers, "the rotary key is missing"),
        (lambda c: c.qk_rope_head_dim * c.num_hidden_layers, "the rotary key alone"),
        (
            lambda c: (c.kv_lora_rank + c.num_attention_heads * c.qk_rope_head_dim) * c.num_hidden_layers,
            "serves all heads",
        ),
        (lambda c: 2 * counted(c), "not twice"),
        (lambda c: (2 * c.kv_lora_rank + c.qk_rope_head_dim) * c.num_hidden_layers, "not twice"),
        (lambda c: c.num_attention_heads * counted(c), "all heads share the row"),
        (lambda c: 2 * c.latent_width, "in bytes of bf16"),
        (lambda c: 4 * counted(c), "bytes of fp32"),
        (lambda c: c.mha_width * c.num_hidden_layers, "multi-head attention would keep"),
        (
            lambda c: c.num_attention_heads * (c.qk_head_dim + c.v_head_dim) * c.num_hidden_layers,
            "thrown away after use",
        ),
        (lambda c: 7, "one latent and one rotary key"),
    ],
)
def test_a_wrong_count_is_explained(attempt, says):
    feedback = check_cached_elements(attempt)
    assert not feedback.passed and says in feedback.text, feedback


def test_a_count_of_one_model_alone_is_not_enough():
    feedback = check_cached_elements(lambda c: 15_552)
    assert not feedback.passed and "Right so far: v2-lite." in feedback.text


def by_einsum(content, position, latent, k_rope, up_key, scale):
    query = torch.einsum("thn,hnc->thc", content, up_key)
    return (torch.einsum("thc,sc->hts", query, latent) + torch.einsum("thr,sr->hts", position, k_rope)) * scale


def by_rows(content, position, latent, k_rope, up_key, scale):
    query = torch.cat([(content.transpose(0, 1) @ up_key), position.transpose(0, 1)], -1)
    return query @ torch.cat([latent, k_rope], -1).T * scale


def head_by_head(content, position, latent, k_rope, up_key, scale):
    each = []
    for head in range(content.shape[1]):
        query = content[:, head] @ up_key[head]
        each.append((query @ latent.T + position[:, head] @ k_rope.T) * scale)
    return torch.stack(each)


def in_single_precision(content, position, latent, k_rope, up_key, scale):
    return by_einsum(*(x.float() for x in (content, position, latent, k_rope, up_key)), scale)


@pytest.mark.parametrize("attempt", [by_einsum, by_rows, head_by_head, in_single_precision])
def test_right_scores_are_solved_however_they_are_written(attempt):
    feedback = check_absorbed_scores(attempt)
    assert feedback.passed, feedback


def expanded(content, position, latent, k_rope, up_key, scale):
    keys = torch.einsum("sc,hnc->shn", latent, up_key)
    return (torch.einsum("thn,shn->hts", content, keys) + torch.einsum("thr,sr->hts", position, k_rope)) * scale


def parts(content, position, latent, k_rope, up_key, scale):
    return by_einsum(content, position * 0, latent, k_rope, up_key, 1), by_einsum(
        content * 0, position, latent, k_rope, up_key, 1
    )


@pytest.mark.parametrize(
    ("attempt", "says"),
    [
        (lambda *given: None, "returned nothing"),
        (lambda *given: by_einsum(*given).tolist(), "A tensor is expected"),
        (lambda *given: by_einsum(*given).transpose(0, 1), "Yours is [queries, heads, keys]"),
        (lambda *given: by_einsum(*given)[0], "[heads, queries, keys] is expected"),
        (lambda *given: sum(parts(*given)), "the scale is missing"),
        (lambda *given: parts(*given)[0] * given[-1], "the rotary part is missing: without it"),
        (lambda *given: parts(*given)[0], "the rotary part and the scale are missing"),
        (lambda *given: parts(*given)[1] * given[-1], "the content part is missing"),
        (lambda *given: parts(*given)[0] * given[-1] + parts(*given)[1], "the content part alone; it belongs"),
        (lambda *given: parts(*given)[0] + parts(*given)[1] * given[-1], "the rotary part alone; it belongs"),
        (lambda *given: sum(parts(*given)) / given[-1], "multiply by it"),
        (lambda *given: by_einsum(*given).softmax(-1), "already probabilities"),
        (lambda *given: by_einsum(*given[:-1], 10**-0.5), "Use `scale` as it is given"),
        (lambda *given: by_einsum(*given).flip(0), "by its own up_key"),
        (expanded, "the expanded form"),
    ],
)
def test_wrong_scores_are_explained(attempt, says):
    feedback = check_absorbed_scores(attempt)
    assert not feedback.passed and says in feedback.text, feedback
