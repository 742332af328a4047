"""Config: what a DeepSeek-V2 is, in numbers. Field names are those of the checkpoint's config.json."""

import json
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import NamedTuple

from workbench.errors import CheckpointError

MODEL_TYPES = ("deepseek_v2", "deepseek")
TOPK_METHODS = ("greedy", "group_limited_greedy")
DTYPES = ("float32", "bfloat16", "float16")


class Parameters(NamedTuple):
    """Numbers of weights: all of them, and those one token passes through (embedding and head included)."""

    total: int
    active: int


@dataclass(frozen=True)
class Yarn:
    """Context extension by YaRN (arXiv 2309.00071) in DeepSeek's dialect: two mscales instead of one temperature."""

    factor: float
    original_max_position_embeddings: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0


@dataclass(frozen=True)
class Config:
    """The shape of one model. Frozen: derive a variant with `dataclasses.replace`.

    Widths are numbers of elements. `norm_topk_prob` and `routed_scaling_factor` exclude each other as in the
    original code: normalised gates are not scaled.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    moe_intermediate_size: int = 0
    n_routed_experts: int | None = None
    n_shared_experts: int | None = None
    num_experts_per_tok: int = 0
    first_k_dense_replace: int = 0
    moe_layer_freq: int = 1
    topk_method: str = "greedy"
    n_group: int = 1
    topk_group: int = 1
    norm_topk_prob: bool = False
    routed_scaling_factor: float = 1.0
    aux_loss_alpha: float = 0.001
    seq_aux: bool = True
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: Yarn | None = None
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    bos_token_id: int = 100000
    eos_token_id: int = 100001
    dtype: str = "bfloat16"
    name: str = field(default="", compare=False)

    @property
    def qk_head_dim(self) -> int:
        """Width of one query or key head: the content part, then the rotary part."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_width(self) -> int:
        """Elements cached per token and layer: the compressed latent and the shared rotary key (576 in V2)."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def mha_width(self) -> int:
        """Elements per token and layer that multi-head attention with these heads would cache: 2 n_h d_h (table 1)."""
        return 2 * self.num_attention_heads * self.v_head_dim

    def is_moe(self, layer: int) -> bool:
        return bool(self.n_routed_experts) and layer >= self.first_k_dense_replace and layer % self.moe_layer_freq == 0

    def parameters(self) -> Parameters:
        """Counted from the shapes; 236B and 21B are `preset("v2").parameters()`."""
        hidden, heads = self.hidden_size, self.num_attention_heads
        if self.q_lora_rank is None:
            query = hidden * heads * self.qk_head_dim
        else:
            query = self.q_lora_rank * (hidden + 1 + heads * self.qk_head_dim)
        attention = query + hidden * self.latent_width + self.kv_lora_rank
        attention += self.kv_lora_rank * heads * (self.qk_nope_head_dim + self.v_head_dim)
        attention += heads * self.v_head_dim * hidden
        expert = 3 * hidden * self.moe_intermediate_size
        shared = (self.n_shared_experts or 0) * expert
        total = active = hidden + (1 if self.tie_word_embeddings else 2) * self.vocab_size * hidden
        for layer in range(self.num_hidden_layers):
            both = attention + 2 * hidden
            if self.is_moe(layer):
                both += shared + hidden * self.n_routed_experts
                total += both + self.n_routed_experts * expert
                active += both + self.num_experts_per_tok * expert
            else:
                both += 3 * hidden * self.intermediate_size
                total += both
                active += both
        return Parameters(total, active)

    @classmethod
    def preset(cls, name: str) -> "Config":
        """A released shape, without its weights: "v2", "v2.5", "v2-lite"; and "pocket", which ships with its own."""
        if name not in PRESETS:
            raise CheckpointError(f"no preset called {name!r}; there are {', '.join(sorted(PRESETS))}")
        return replace(PRESETS[name], name=name)

    @classmethod
    def from_json(cls, source: "str | Path | dict") -> "Config":
        """Reads config.json (a path, or its content), in both spellings of the rotary settings.

        Raises CheckpointError for anything this code would compute wrongly: another model, activation, scoring
        function, selection method or rope type. Fields that do not change the result are ignored.
        """
        if isinstance(source, dict):
            raw, where = source, "config"
        else:
            where = str(source)
            try:
                raw = json.loads(Path(source).read_text(encoding="utf-8"))
            except OSError as error:
                raise CheckpointError(
                    f"{where}: {error.strerror.lower()}. A checkpoint directory has a config.json."
                ) from None
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise CheckpointError(f"{where}: not valid JSON ({error}). Download it again.") from None
        if not isinstance(raw, dict):
            raise CheckpointError(f"{where}: expected a JSON object, found {type(raw).__name__}.")
        _refuse(raw, where)
        needed = [f.name for f in fields(cls) if f.default is MISSING and f.name not in raw]
        if needed:
            raise CheckpointError(f"{where}: {', '.join(needed)} missing. Copy config.json from the checkpoint again.")
        values = {f.name: raw[f.name] for f in fields(cls) if f.name in raw and f.name not in ("name", "rope_scaling")}
        values |= _rope(raw, where)
        values["dtype"] = str(raw.get("dtype") or raw.get("torch_dtype") or "bfloat16").removeprefix("torch.")
        if isinstance(values.get("eos_token_id"), list):
            values["eos_token_id"] = next(iter(values["eos_token_id"]), None)
        for key in ("bos_token_id", "eos_token_id", "n_group", "topk_group", "aux_loss_alpha", "seq_aux"):
            if key in values and values[key] is None:
                del values[key]
        _check_types(values, where)
        config = cls(**values)
        _check_shape(config, where)
        return config

    def to_dict(self) -> dict:
        """The content of config.json, in the original spelling, as transformers, vLLM and SGLang read it."""
        values = asdict(self)
        del values["name"]
        values["torch_dtype"] = values.pop("dtype")
        if self.rope_scaling is not None:
            values["rope_scaling"] = {"type": "yarn"} | values["rope_scaling"]
        return values | {
            "architectures": ["DeepseekV2ForCausalLM"],
            "model_type": "deepseek_v2",
            "num_key_value_heads": self.num_attention_heads,
            "hidden_act": "silu",
            "scoring_func": "softmax",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "pretraining_tp": 1,
            "use_cache": True,
        }


def _refuse(raw: dict, where: str) -> None:
    model_type = raw.get("model_type")
    if model_type not in MODEL_TYPES:
        raise CheckpointError(f"{where}: model_type {model_type!r} is not supported; known: {', '.join(MODEL_TYPES)}.")
    if model_type == "deepseek" and "kv_lora_rank" not in raw:
        raise CheckpointError(f"{where}: model_type 'deepseek' without kv_lora_rank is DeepSeek-MoE, which has no MLA.")
    known = {
        "hidden_act": ("silu",),
        "scoring_func": ("softmax",),
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "topk_method": TOPK_METHODS,
        "num_key_value_heads": (raw.get("num_attention_heads"),),
    }
    for key, allowed in known.items():
        if raw.get(key) is not None and raw[key] not in allowed:
            raise CheckpointError(
                f"{where}: {key} {raw[key]!r} is not supported; known: {', '.join(map(str, allowed))}. "
                "Is this a DeepSeek-V2 checkpoint?"
            )
    if quantised := raw.get("quantization_config"):
        method = quantised.get("quant_method", "?") if isinstance(quantised, dict) else quantised
        if method == "deepseek-workbench":  # packed here, see pack.py
            return
        raise CheckpointError(f"{where}: weights quantised by {method!r} cannot be read; use the bf16 checkpoint.")


def _rope(raw: dict, where: str) -> dict:
    """`rope_scaling` and `rope_theta` (original) or `rope_parameters` (transformers 5), which wins where both are."""
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise CheckpointError(f"{where}: the rotary settings must be an object or null, found {rope!r}.")
    theta = rope.get("rope_theta", raw.get("rope_theta", 10000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return {"rope_theta": theta, "rope_scaling": None}
    if kind not in ("yarn", "deepseek_yarn"):
        raise CheckpointError(f"{where}: rope type {kind!r} is not supported; known: yarn, default.")
    if rope.get("attention_factor") is not None or rope.get("truncate") is False:
        raise CheckpointError(f"{where}: YaRN with attention_factor or truncate=false is not DeepSeek-V2's.")
    settings = {f.name: rope[f.name] for f in fields(Yarn) if rope.get(f.name) is not None}
    if "factor" not in settings:
        raise CheckpointError(f"{where}: YaRN needs a factor.")
    wrong = {k: v for k, v in settings.items() if isinstance(v, bool) or not isinstance(v, int | float)}
    if wrong:
        raise CheckpointError(f"{where}: YaRN settings must be numbers, found {wrong}.")
    yarn = Yarn(**settings)
    if yarn.factor <= 0 or yarn.original_max_position_embeddings < 1 or not 0 < yarn.beta_slow <= yarn.beta_fast:
        raise CheckpointError(
            f"{where}: YaRN needs a positive factor and length, and 0 < beta_slow <= beta_fast; found {settings}."
        )
    return {"rope_theta": theta, "rope_scaling": yarn}


def _check_types(values: dict, where: str) -> None:
    optional = {"q_lora_rank", "n_routed_experts", "n_shared_experts"}
    for f in fields(Config):
        if f.name not in values or f.name in ("rope_scaling", "name"):
            continue
        value = values[f.name]
        if value is None and f.name in optional:
            continue
        expected = {"int": int, "int | None": int, "float": (int, float), "bool": bool, "str": str}[
            f.type if isinstance(f.type, str) else getattr(f.type, "__name__", str(f.type))
        ]
        if not isinstance(value, expected) or (isinstance(value, bool) and expected is not bool):
            kind = f.type if isinstance(f.type, str) else getattr(f.type, "__name__", f.type)
            raise CheckpointError(f"{where}: {f.name} must be {kind}, found {value!r}.")


def _check_shape(config: Config, where: str) -> None:
    def need(condition: bool, message: str) -> None:
        if not condition:
            raise CheckpointError(f"{where}: {message}.")

    sizes = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads kv_lora_rank " \
            "qk_nope_head_dim qk_rope_head_dim v_head_dim moe_layer_freq max_position_embeddings"  # fmt: skip
    for key in sizes.split():
        need(getattr(config, key) > 0, f"{key} must be positive, found {getattr(config, key)}")
    need(config.q_lora_rank is None or config.q_lora_rank > 0, "q_lora_rank must be positive or null")
    need(config.qk_rope_head_dim % 2 == 0, "qk_rope_head_dim must be even: rotary embedding turns pairs")
    need(config.rope_theta > 1 and config.rms_norm_eps > 0, "rope_theta must exceed 1, and rms_norm_eps 0")
    for key in ("bos_token_id", "eos_token_id"):
        need(0 <= getattr(config, key) < config.vocab_size, f"{key} must be below vocab_size {config.vocab_size}")
    need(config.dtype in DTYPES, f"torch_dtype {config.dtype!r} is not supported; known: {', '.join(DTYPES)}")
    experts, groups = config.n_routed_experts, config.n_group
    if not experts:
        return
    need(config.moe_intermediate_size > 0, "moe_intermediate_size must be positive")
    need(0 < config.num_experts_per_tok <= experts, f"num_experts_per_tok must be in 1..{experts}")
    if config.topk_method == "group_limited_greedy":
        need(groups > 0 and experts % groups == 0, f"n_group {groups} must divide n_routed_experts {experts}")
        need(0 < config.topk_group <= groups, f"topk_group must be in 1..{groups}")
        need(
            config.num_experts_per_tok <= config.topk_group * experts // groups,
            "num_experts_per_tok exceeds the experts of topk_group groups",
        )


_V2 = Config(
    vocab_size=102400,
    hidden_size=5120,
    intermediate_size=12288,
    moe_intermediate_size=1536,
    num_hidden_layers=60,
    num_attention_heads=128,
    q_lora_rank=1536,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    n_routed_experts=160,
    n_shared_experts=2,
    num_experts_per_tok=6,
    first_k_dense_replace=1,
    topk_method="group_limited_greedy",
    n_group=8,
    topk_group=3,
    routed_scaling_factor=16.0,
    rope_scaling=Yarn(factor=40, mscale=0.707, mscale_all_dim=0.707),
    max_position_embeddings=163840,
)

PRESETS = {
    "v2": _V2,
    "v2.5": replace(_V2, rope_scaling=Yarn(factor=40, mscale=1.0, mscale_all_dim=1.0)),
    "v2-lite": replace(
        _V2,
        hidden_size=2048,
        intermediate_size=10944,
        moe_intermediate_size=1408,
        num_hidden_layers=27,
        num_attention_heads=16,
        q_lora_rank=None,
        n_routed_experts=64,
        topk_method="greedy",
        n_group=1,
        topk_group=1,
        routed_scaling_factor=1.0,
    ),
    "pocket": Config(
        vocab_size=4096,
        hidden_size=192,
        intermediate_size=512,
        moe_intermediate_size=64,
        num_hidden_layers=6,
        num_attention_heads=8,
        q_lora_rank=96,
        kv_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        n_routed_experts=32,
        n_shared_experts=2,
        num_experts_per_tok=4,
        first_k_dense_replace=1,
        topk_method="group_limited_greedy",
        n_group=8,
        topk_group=3,
        routed_scaling_factor=4.0,
        rope_scaling=Yarn(factor=4, original_max_position_embeddings=512, mscale=0.707, mscale_all_dim=0.707),
        max_position_embeddings=2048,
        bos_token_id=4078,
        eos_token_id=4079,
    ),
}
