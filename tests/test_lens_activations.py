"""What lenses say of activations is what loops over their definitions say, and on pocket what the model says."""

import math

import numpy as np
import pytest
import torch

import workbench as wb
from workbench.errors import RequestError
from workbench.lens.attention import attended, heads
from workbench.lens.contribution import contributions, expert_contributions
from workbench.lens.latent import effective_rank, norms, outliers, pca, rank, spectrum
from workbench.lens.readout import expert_lens, logit_lens
from workbench.lens.tokens import pieces
from workbench.recorder import Recorder

VOCAB, WIDTH = 50, 12


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


HEAD, NORM = numbers(VOCAB, WIDTH, seed=1).float(), numbers(WIDTH, seed=2).abs().float() + 0.5


def unembed(x):
    return (x * NORM / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()) @ HEAD.T


# --- contributions -------------------------------------------------------------------------------------------------


def test_contributions_are_norms_and_angles():
    routed, shared, residual = numbers(3, 5), numbers(3, 5, seed=1), numbers(3, 5, seed=2)
    table = contributions(routed, shared, residual)
    for t, row in table.iterrows():
        r, s, m = (x[t].numpy() for x in (routed, shared, residual))
        length = lambda v: math.sqrt(sum(v * v))  # noqa: E731
        assert row["routed"] == pytest.approx(length(r)) and row["shared"] == pytest.approx(length(s))
        assert row["ratio"] == pytest.approx(length(r) / length(s))
        assert row["cosine"] == pytest.approx(sum(r * s) / length(r) / length(s))
        assert row["routed_share"] == pytest.approx(sum(r * (r + s)) / sum((r + s) ** 2))
        assert row["change"] == pytest.approx(length(r + s) / length(m)) and row["residual"] == pytest.approx(length(m))
    assert "residual" not in contributions(routed, shared)


def test_the_shares_of_routed_and_shared_make_one():
    routed, shared = numbers(9, 4), numbers(9, 4, seed=1)
    both = contributions(routed, shared)["routed_share"] + contributions(shared, routed)["routed_share"]
    assert both.tolist() == pytest.approx([1] * 9)


def test_a_model_without_shared_output_is_all_routed():
    row = contributions(numbers(1, 4), torch.zeros(1, 4)).loc[0]
    assert row["routed_share"] == pytest.approx(1) and row["shared"] == 0 and row["ratio":"cosine"].isna().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_contributions_are_computed_finer_than_they_are_stored(dtype):
    x = torch.full((1, 4096), 0.01, dtype=dtype)
    assert contributions(x, x).loc[0, "routed"] == pytest.approx(64 * float(x[0, 0]), rel=1e-9)


def test_tensors_of_other_shapes_are_refused():
    with pytest.raises(RequestError, match="Take one sequence of a batch"):
        contributions(numbers(1, 3, 4), numbers(1, 3, 4))
    with pytest.raises(RequestError, match=r"\(3, 4\) and \(3, 5\)"):
        contributions(numbers(3, 4), numbers(3, 5))
    with pytest.raises(RequestError, match=r"must be \[T, K, D\]"):
        expert_contributions(numbers(3, 2, 4), numbers(3, 3), torch.zeros(3, 2))


def test_each_experts_part_of_the_sum():
    out, gates = numbers(2, 3, 5), numbers(2, 3, seed=1).abs()
    ids = torch.tensor([[4, 0, 2], [1, 3, -1]])
    table = expert_contributions(out, gates, ids)
    assert table[["token", "slot", "expert"]].values.tolist() == [[0, 0, 4], [0, 1, 0], [0, 2, 2], [1, 0, 1], [1, 1, 3]]
    for _, row in table.iterrows():
        t, k = int(row["token"]), int(row["slot"])
        parts = [(gates[t, n] * out[t, n]).numpy() for n in range(3) if ids[t, n] >= 0]
        total, without = sum(parts), sum(parts) - parts[k]
        norm = np.linalg.norm
        assert row["gate"] == float(gates[t, k]) and row["norm"] == pytest.approx(norm(parts[k]))
        assert row["cosine"] == pytest.approx(parts[k] @ total / norm(parts[k]) / norm(total))
        assert row["change"] == pytest.approx(norm(total - without) / norm(total))
        assert row["turn"] == pytest.approx(without @ total / norm(without) / norm(total))
    assert table.groupby("token")["share"].sum().tolist() == pytest.approx([1, 1])


def test_the_only_expert_is_everything():
    row = expert_contributions(numbers(1, 2, 4), torch.ones(1, 2), torch.tensor([[3, -1]])).loc[0]
    assert row[["share", "cosine", "change"]].tolist() == pytest.approx([1, 1, 1]) and math.isnan(row["turn"])


# --- read-outs -----------------------------------------------------------------------------------------------------


def test_the_logit_lens_by_its_definition(tokenizer):
    resid = {5: numbers(4, WIDTH).float(), 2: numbers(4, WIDTH, seed=1).float()}
    table = logit_lens(resid, unembed, tokenizer, count=3).set_index(["layer", "token"])
    assert table.index.tolist() == [(layer, t) for layer in (2, 5) for t in range(4)]
    for (layer, t), row in table.iterrows():
        here, final = (unembed(resid[n][t]).double().softmax(-1).numpy() for n in (layer, 5))
        order = np.argsort(-here)
        assert row["tokens"] == pieces(tokenizer, order[:3].tolist()) and row["top"] == row["tokens"][0]
        assert row["probabilities"] == pytest.approx(here[order[:3]].tolist(), rel=1e-4)
        assert row["final"] == pieces(tokenizer, [final.argmax()])[0]
        assert row["final_rank"] == 1 + order.tolist().index(final.argmax())
        assert row["final_probability"] == pytest.approx(here[final.argmax()], rel=1e-4)
        assert row["kl"] == pytest.approx(sum(final * np.log(final / here)), abs=1e-4)
    assert table.loc[5, "final_rank"].eq(1).all() and table.loc[5, "kl"].max() < 1e-6


def test_the_logit_lens_takes_the_models_own_logits(tokenizer):
    resid, final = {0: numbers(2, WIDTH).float()}, torch.zeros(2, VOCAB)
    final[:, 7] = 30.0
    table = logit_lens(resid, unembed, tokenizer, count=99, final=final)
    assert (table["final"] == pieces(tokenizer, [7])[0]).all() and len(table.loc[0, "tokens"]) == VOCAB
    assert table["kl"].tolist() == pytest.approx((-unembed(resid[0]).log_softmax(-1)[:, 7]).tolist(), abs=1e-3)


def test_what_the_logit_lens_refuses(tokenizer):
    for resid in ({}, {1: numbers(1, 3, WIDTH)}, {1: numbers(3, WIDTH), 2: numbers(2, WIDTH)}):
        with pytest.raises(RequestError, match="resid must have"):
            logit_lens(resid, unembed, tokenizer)
    with pytest.raises(RequestError, match="final must be"):
        logit_lens({1: numbers(3, WIDTH).float()}, unembed, tokenizer, final=torch.zeros(2, VOCAB))


def test_the_expert_lens_is_the_head_on_what_the_expert_adds(tokenizer):
    out, resid = numbers(2, 2, WIDTH).float(), numbers(2, WIDTH, seed=2).float()
    gates, ids = numbers(2, 2, seed=1).abs().float(), torch.tensor([[6, 1], [0, -1]])
    table = expert_lens(out, gates, ids, resid, unembed, tokenizer, count=4, targets=[9, 11])
    assert table[["token", "slot", "expert"]].values.tolist() == [[0, 0, 6], [0, 1, 1], [1, 0, 0]]
    for _, row in table.iterrows():
        t, k = row["token"], row["slot"]
        divisor = math.sqrt(float(resid[t].square().mean()))
        logits = (HEAD @ (NORM * out[t, k] * gates[t, k]) / divisor).numpy()
        logits -= logits.mean()
        order = np.argsort(-logits)
        assert row["towards"] == pieces(tokenizer, order[:4].tolist())
        assert row["away"] == pieces(tokenizer, order[::-1][:4].tolist())
        assert row["up"] == pytest.approx(logits[order[:4]].tolist(), rel=1e-3)
        assert row["down"] == pytest.approx(logits[order[::-1][:4]].tolist(), rel=1e-3)
        assert row["target"] == pieces(tokenizer, [[9, 11][t]])[0]
        assert row["target_logit"] == pytest.approx(logits[[9, 11][t]], rel=1e-3, abs=1e-5)


def test_the_parts_of_the_experts_add_up_however_small(tokenizer):
    out, resid = 1e-4 * numbers(1, 3, WIDTH).float(), 50 * numbers(1, WIDTH, seed=2).float()
    gates = torch.tensor([[0.5, 2.0, 1.0]])
    parts = expert_lens(out, gates, torch.tensor([[0, 1, 2]]), resid, unembed, tokenizer, targets=[3])
    total = (out * gates[..., None]).sum(1, keepdim=True)
    whole = expert_lens(total, torch.ones(1, 1), torch.tensor([[0]]), resid, unembed, tokenizer, targets=[3])
    assert parts["target_logit"].sum() == pytest.approx(whole.loc[0, "target_logit"], rel=1e-4)


def test_an_expert_that_says_nothing_moves_nothing(tokenizer):
    quiet = [torch.zeros(1, 1, WIDTH), torch.ones(1, 1), torch.zeros(1, 1), numbers(1, WIDTH).float()]
    assert expert_lens(*quiet, unembed, tokenizer).loc[0, "up"] == [0.0] * 5
    with pytest.raises(RequestError, match="targets must be one a token"):
        expert_lens(*quiet, unembed, tokenizer, targets=[])
    with pytest.raises(RequestError, match="resid_mid"):
        expert_lens(*quiet[:3], numbers(2, WIDTH), unembed, tokenizer)


# --- attention -----------------------------------------------------------------------------------------------------


def scores(count, new, length, seed=0):
    content, position = numbers(count, new, length, seed=seed), 2 * numbers(count, new, length, seed=seed + 1)
    future = torch.ones(new, length, dtype=torch.bool).triu(length - new + 1)
    return (content + position).masked_fill(future, -math.inf).softmax(-1), content, position


@pytest.mark.parametrize("new, length", [(5, 5), (2, 7), (1, 3)])
def test_heads_by_their_definitions(new, length):
    pattern, content, position = scores(3, new, length)
    table = heads(pattern, content, position)
    assert table.index.tolist() == [0, 1, 2, "uniform"]
    for h in range(3):
        entropy, even, distance, first, own, cov, var = [], [], [], [], [], 0.0, 0.0
        for q in range(new):
            seen = length - new + q + 1
            p = pattern[h, q, :seen].numpy()
            c, s = (x[h, q, :seen].numpy() for x in (content, content + position))
            cov, var = cov + sum((c - c.mean()) * (s - s.mean())), var + sum((s - s.mean()) ** 2)
            if seen > 1:
                entropy.append(-sum(p * np.log(p)))
                even.append(entropy[-1] / math.log(seen))
                distance.append(sum(p[k] * (seen - 1 - k) for k in range(seen)))
                first.append(p[0])
                own.append(p[-1])
        row = table.loc[h]
        found = row[["entropy", "evenness", "distance", "first", "itself"]].tolist()
        assert found == pytest.approx([np.mean(x) for x in (entropy, even, distance, first, own)])
        assert row["content_share"] == pytest.approx(cov / var)
        assert row["position_share"] == pytest.approx(1 - cov / var)


def test_uniform_attention_is_what_it_says():
    row = heads(scores(1, 3, 3)[0]).loc["uniform"]
    assert row["entropy"] == pytest.approx((math.log(2) + math.log(3)) / 2) and row["evenness"] == pytest.approx(1)
    assert row["distance"] == pytest.approx((0.5 + 1) / 2) and row["first"] == row["itself"] == pytest.approx(5 / 12)


def test_content_alone_and_what_lies_in_the_future():
    pattern, content, _ = scores(2, 4, 4)
    content = content.masked_fill(torch.ones(4, 4, dtype=torch.bool).triu(1), math.nan)  # not known to the recorder
    assert heads(pattern, content, torch.zeros(2, 4, 4))["content_share"].iloc[:2].tolist() == pytest.approx([1, 1])
    flat = heads(pattern, torch.full((2, 4, 4), 0.3), torch.full((2, 4, 4), 7.7))
    assert flat[["content_share", "position_share"]].isna().all().all()


def test_one_token_has_nothing_to_attend_to():
    with pytest.raises(RequestError, match="sees one key"):
        heads(torch.ones(2, 1, 1))


def test_what_a_token_attends_to():
    pattern, content, position = scores(2, 3, 5)
    table = attended(pattern, 1, content, position, head=1, texts=list("abcde"))
    assert table["text"].tolist() == list("abcd") and table["back"].tolist() == [3, 2, 1, 0]
    weights = np.exp(table["content"] + table["position"])
    assert table["pattern"].tolist() == pytest.approx((weights / weights.sum()).tolist())
    mean = attended(pattern, -1)
    assert mean["pattern"].tolist() == pytest.approx(pattern.mean(0)[2].tolist()) and "content" not in mean


def test_what_attention_lenses_refuse():
    pattern, content, position = scores(2, 3, 5)
    for call, message in (
        (lambda: heads(pattern, content), "give both, or neither"),
        (lambda: heads(pattern, content, position[:1]), "alike; got"),
        (lambda: heads(pattern[None]), "of one sequence"),
        (lambda: attended(pattern, 3), "query must be from 0 to 2"),
        (lambda: attended(pattern, 0, head=2), "head must be from 0 to 1"),
        (lambda: attended(pattern, 0, texts=["a"]), "one a key, 5; got 1"),
    ):
        with pytest.raises(RequestError, match=message):
            call()


# --- the latent ----------------------------------------------------------------------------------------------------


def test_ranks_of_what_is_known():
    directions = torch.eye(8, dtype=torch.float64)[:3]
    even = torch.cat([directions, -directions])  # three directions alike, mean 0
    assert rank(even) == pytest.approx((3, 3))
    two = torch.tensor([[3.0, 0], [-3, 0], [0, 1], [0, -1]])  # singular values 3 and 1, times sqrt(2)
    assert rank(two) == pytest.approx((math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)), 10**2 / (81 + 1)))
    assert rank(two + 100) == pytest.approx(rank(two)) and rank(two + 100, center=False).effective < 1.1


def test_the_spectrum_is_that_of_the_covariance():
    x = numbers(20, 6) @ torch.diag(torch.arange(1.0, 7, dtype=torch.float64)) + 3
    table = spectrum(x)
    expected = np.sort(np.linalg.eigvalsh(np.cov(x.numpy().T)))[::-1]
    assert (table["singular"] ** 2 / 19).tolist() == pytest.approx(expected.tolist())
    assert table["share"].tolist() == pytest.approx((expected / expected.sum()).tolist())
    assert table["cumulative"].iloc[-1] == pytest.approx(1) and table.index[0] == 1


def test_the_rank_of_chance_is_beside_it():
    joined = numbers(10, 3) @ numbers(3, 64, seed=1)
    table = effective_rank(joined)
    assert table.loc["observed", "effective"] <= 3 + 1e-6 and (table["possible"] == 9).all()
    assert 8 < table.loc["gaussian", "effective"] < 9  # ten tokens of chance: more cannot be seen
    assert table.loc["shuffled", "effective"] > 6 and table.loc["observed", "effective_sd"] == 0
    chance = effective_rank(numbers(40, 16, seed=3))
    gap = abs(chance.loc["observed", "effective"] - chance.loc["gaussian", "effective"])
    assert gap < 5 * chance.loc["gaussian", "effective_sd"]
    assert effective_rank(joined).equals(table) and (effective_rank(joined, center=False)["possible"] == 10).all()


def test_a_channel_with_an_outlier_lowers_the_rank_of_the_shuffled_null_too():
    x = numbers(50, 8)
    x[7, 2] = 500.0
    table = effective_rank(x)
    assert table.loc["shuffled", "participation"] < 1.5 < 6 < table.loc["gaussian", "participation"]


@pytest.mark.parametrize("value", [0.0, 0.1, 1e6])
def test_tokens_that_do_not_differ(value):
    same = torch.full((7, 4), value)
    assert rank(same) == (0, 0) and not spectrum(same).isna().any().any()
    with pytest.raises(RequestError, match="all tokens are the same"):
        pca(same)


def test_pca_is_the_same_whatever_the_sign_and_rebuilds_the_tokens():
    x = numbers(9, 5) + 4
    found = pca(x, 5)
    assert found.components @ found.components.T == pytest.approx(np.eye(5), abs=1e-9)
    assert found.mean + found.projections @ found.components == pytest.approx(x.numpy())
    assert found.share == pytest.approx(spectrum(x)["share"].to_numpy())
    assert all(row[np.abs(row).argmax()] > 0 for row in found.components)
    mirrored = pca(-x, 5)
    assert mirrored.components == pytest.approx(found.components) and pca(x, 1).projections.shape == (9, 1)


@pytest.mark.parametrize("shape, n", [((3, 9), 3), ((9, 3), 4), ((5, 5), 0)])
def test_more_components_than_there_are(shape, n):
    with pytest.raises(RequestError, match=f"asked for {n}"):
        pca(numbers(*shape), n)


def test_norms_of_latent_and_rotary_key():
    table = norms(torch.tensor([[3.0, 4.0], [0, 0]]), torch.tensor([[2.0], [5.0]]))
    assert table.to_numpy() == pytest.approx(np.array([[5, math.sqrt(12.5), 2, 2], [0, 0, 5, 5]]))
    with pytest.raises(RequestError, match="of one sequence"):
        norms(numbers(3, 2), numbers(4, 2))


def test_outliers_by_their_definitions():
    x = numbers(30, 6)
    x[11, 4] = -40.0
    x[:, 1] = 2.0
    table = outliers(x, count=None)
    assert table.index[0] == 4 and table.loc[4, "token"] == 11 and len(table) == 6 and len(outliers(x, 2)) == 2
    for channel, row in table.iterrows():
        values = x[:, channel].numpy()
        rms = math.sqrt((values**2).mean())
        assert row[["mean", "rms"]].tolist() == pytest.approx([values.mean(), rms])
        assert row["peak"] == pytest.approx(max(abs(values)) / rms)
        if channel != 1:
            assert row["kurtosis"] == pytest.approx(((values - values.mean()) ** 4).mean() / values.var() ** 2 - 3)
    assert math.isnan(table.loc[1, "kurtosis"]) and table["peak"].max() <= math.sqrt(30)


@pytest.mark.parametrize("lens", [rank, spectrum, pca, outliers, effective_rank])
def test_one_token_has_no_spread(lens):
    with pytest.raises(RequestError, match="two tokens or more"):
        lens(numbers(1, 4))


# --- pocket --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def seen():
    """Pocket, what a Recorder saw of a text in layer 3, the stream after every layer, and the logits."""
    bench = wb.load("pocket", device="cpu", dtype="fp32")
    tokens = torch.tensor([[bench.tokenizer.bos, *bench.tokenizer.encode("The capital of France is")]])
    inside = Recorder(
        "resid.mid", "moe.expert_out", "moe.gates", "moe.experts", "moe.routed_out", "moe.shared_out", "attn.pattern",
        "attn.scores_content", "attn.scores_position", "attn.kv_latent", "attn.k_rope", layers=[3],
    )  # fmt: skip
    stream = Recorder("resid.post")
    with torch.no_grad():
        logits = bench.model(tokens, probe=stream)
        bench.model(tokens, probe=inside)
    return bench, lambda site: inside[site, 3][0], {n: stream["resid.post", n][0] for n in range(6)}, logits[0]


def test_the_lens_on_the_last_layer_is_the_model(seen):
    bench, _, resid, logits = seen
    table = logit_lens(resid, bench.model.unembed, bench.tokenizer, final=logits)
    last = table[table["layer"] == 5]
    assert last["top"].tolist() == pieces(bench.tokenizer, logits.argmax(-1).tolist())
    assert last["kl"].max() < 1e-6 < table.loc[table["layer"] == 0, "kl"].min()


def test_pockets_experts_add_up_to_its_routed_output(seen):
    bench, at, _, _ = seen
    out, gates, ids = at("moe.expert_out"), at("moe.gates"), at("moe.experts")
    table = expert_contributions(out, gates, ids)
    routed = contributions(at("moe.routed_out"), at("moe.shared_out"), at("resid.mid"))
    sums = (table["norm"] * table["cosine"]).groupby(table["token"]).sum()
    assert sums.tolist() == pytest.approx(routed["routed"].tolist(), rel=1e-4)
    targets = [7] * len(out)
    args = (at("resid.mid"), bench.model.unembed, bench.tokenizer, 5, targets)
    parts = expert_lens(out, gates, ids, *args).groupby("token")["target_logit"].sum()
    one = torch.ones(len(out), 1)
    whole = expert_lens(at("moe.routed_out")[:, None], one, 0 * one, *args)["target_logit"]
    assert parts.tolist() == pytest.approx(whole.tolist(), abs=1e-4)


def test_pockets_scores_are_its_pattern(seen):
    _, at, _, _ = seen
    pattern, content, position = at("attn.pattern"), at("attn.scores_content"), at("attn.scores_position")
    table = heads(pattern, content, position)
    assert len(table) == 9 and not table.iloc[:8].isna().any().any()
    row = attended(pattern, -1, content, position, head=2)
    weights = np.exp(row["content"] + row["position"])
    assert row["pattern"].tolist() == pytest.approx((weights / weights.sum()).tolist(), abs=1e-5)


def test_pockets_latent_can_be_looked_into(seen):
    _, at, _, _ = seen
    c, k_rope = at("attn.kv_latent"), at("attn.k_rope")
    assert effective_rank(c).loc["observed", "effective"] <= len(c) - 1
    assert len(norms(c, k_rope)) == len(c) and len(outliers(k_rope, None)) == 16
