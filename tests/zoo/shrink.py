"""A config whose model has the parts of the published one, and is tiny: from the dict that config.json has.

Widths are all divided by the same number, so that what has to be equal, a sum or a product of others remains so: a head
count is left as it is, and the width of a head is divided. How much a family bears is tried out (:data:`STEPS`).
"""

import re
from collections.abc import Iterator
from typing import Any, NamedTuple


def parts(config: Any) -> Iterator[Any]:
    """A config and all configs in it."""
    yield config
    for value in list(vars(config).values()):
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            yield from parts(value)


class Step(NamedTuple):
    """How far to go. ``width`` divides widths, ``layers`` is how many are left, ``picture`` divides the sides of large
    images; ``heads`` divides the number of heads instead of their width."""

    width: int
    layers: int = 2
    picture: int = 4
    heads: bool = False


# From the smallest to what is nearly the published shape of a layer.
STEPS = (
    Step(16), Step(8, heads=True), Step(8, 4), Step(8, 2, 1), Step(4), Step(8, 99), Step(2, 99, 1, heads=True),
    Step(1, 2, 1),
)  # fmt: skip
WIDEST = 64
# the width of a model goes by these names, and is not divided to less than WIDEST
HIDDEN = ("hidden_size", "d_model", "n_embd", "embed_dim", "hidden_sizes", "embed_dims", "dim")
VOCABULARY, POSITIONS = 320, 256

# an int of such a name divides, if it is at least WIDEST
WIDTH = re.compile(
    r"hidden|d_head|head_size|dim(s|_.*)?$|_dim|dim_|size$|sizes$|n_embd|d_model|d_ff|d_kv|d_inner|width|units|channels?(_size)?$|inter|"
    r"filters?$|rank|planes|features?$|n_inner|embeds?$|state_size|lru|latent|inner|proj|pos_feats|upsample_groups$|channel_list$"
)
# ... unless its name says that it is something else
NO_WIDTH = re.compile(
    r"vocab|position|image_embedding|image_size|img_size|patch|window|kernel|chunk|^num_(?!pos_feats)|^n_(?!embd|inner)|max_|_id$|_ids$|rate|"
    r"length|stride|mem_|token|batch|(?<!up)(?<!down)sample|context|block_size|layers?$|spec_size|input_size|num_channels|codebook_size|"
    r"crop|queue|num_mel|buckets|group_size|hop|fft|index_topk|pool|pretrain|train_size|size_divisor|bins|sparse_block"
)
LAYERS = re.compile(
    r"(^|_)(num_)?(hidden_|encoder_|decoder_)*layers?$|^n_layers?$|depth$|num_blocks$|num_hidden_layers|_layers$|"
    r"num_stacks$|num_residual_layers$"
)
NO_LAYERS = re.compile(
    r"nextn|feature|shared|look|dense|cross_attention|first_k|moe_layers|iou_head|conv|max_depth|rope"
)
EXPERTS = re.compile(r"^(num_local_experts|num_experts|n_routed_experts|moe_num_experts|num_routed_experts)$")
TOP_K = re.compile(r"(experts_per_tok(en)?|moe_topk|moe_k|top_k_experts|num_selected_experts|moe_top_k)$")
VOCAB = re.compile(r"vocab_size$|num_embeddings$")
IDS = re.compile(r"(_id|_ids|_index|_idx|_token)$|suppress_tokens")
HEADS = re.compile(r"(^|_)(num_)?(attention_|key_value_|kv_|query_|n_)*heads?$")
HEAD_WIDTH = re.compile(r"head_dim|d_kv$|d_head|head_size|rope_dim|rotary_dim")
POSITION = re.compile(
    r"max_position_embeddings$|^n_positions$|max_source_positions$|max_target_positions$|max_seq_len$|^n_ctx$"
)
PICTURE = re.compile(r"(image_size|img_size|input_size|spec_size)$")


class Shrinker:
    """Shrinks the parts of one config, which share their numbers.

    Args:
        step: how far.
    """

    def __init__(self, step: Step) -> None:
        self.step = step
        self.ids: dict[int, int] = {}

    def config(self, values: dict[str, Any]) -> dict[str, Any]:
        """The dict of a config or of a part of it, made smaller; the dict itself stays."""
        layers = self._layers(values)
        stages = self._stages(values, layers)
        made: dict[str, Any] = {}
        for key, value in values.items():
            if key in ("id2label", "label2id", "_name_or_path", *stages):
                continue
            if re.fullmatch("_?out_(features|indices)|stage_names", key):
                made[key] = value
                continue
            if key == "per_layer_config":
                made[key] = self._per_layer(values, layers)
            elif isinstance(value, dict):
                made[key] = self.config(value) if "model_type" in value or key.endswith("config") else self._dict(value)
            else:
                made[key] = self._value(key, value, layers)
        return {**made, **{key: value for key, value in stages.items() if value}}

    def _stages(self, values: dict[str, Any], layers: dict[int, int]) -> dict[str, Any]:
        """What a backbone gives whose stages are its layers: as many of the last ones as before, of fewer layers."""
        numbers = [int(name[5:]) for name in values.get("out_features") or () if re.fullmatch(r"stage\d+", str(name))]
        count = len(values.get("stage_names") or ()) - 1
        if count not in layers or count < 7 or not numbers:
            return {}
        left = layers[count] = max(layers[count], len(numbers))
        return {
            "out_features": [f"stage{left - i}" for i in reversed(range(len(numbers)))],
            "out_indices": None, "_out_features": None, "_out_indices": None, "stage_names": None,
        }  # fmt: skip

    def _layers(self, values: dict[str, Any]) -> dict[int, int]:
        """Number of layers of this part -> how many are left: one of each kind at least."""
        kinds = [v for v in values.values() if isinstance(v, list) and v and all(isinstance(x, str) for x in v)]
        found = {}
        for key, value in values.items():
            if type(value) is int and value > 2 and LAYERS.search(key) and not NO_LAYERS.search(key):
                needed = max((len(dict.fromkeys(kind)) for kind in kinds if len(kind) == value), default=1)
                found[value] = min(value, max(self.step.layers, needed))
        return found

    def _per_layer(self, values: dict[str, Any], layers: dict[int, int]) -> dict[Any, Any]:
        """What some layers have of their own, for the layers of the same kinds."""
        kinds, own = values.get("layer_types") or [], {int(k): v for k, v in values["per_layer_config"].items()}
        made = {}
        for layer, kind in enumerate(self._list("layer_types", kinds, layers)):
            if (found := own.get(kinds.index(kind))) is not None:
                made[layer] = self.config(found) if isinstance(found, dict) else found
        return made

    def _dict(self, values: dict[str, Any]) -> dict[str, Any]:
        """Values by a key, such as those of RoPE: sections are parts of a head."""
        made = dict(values)
        sections = values.get("mrope_section")
        if isinstance(sections, list):
            made["mrope_section"] = [x if self.step.heads else max(x // self.step.width, 1) for x in sections]
        return {key: self._dict(value) if isinstance(value, dict) else value for key, value in made.items()}

    def _value(self, key: str, value: Any, layers: dict[int, int]) -> Any:
        if isinstance(value, list | tuple):
            return self._list(key, list(value), layers)
        if type(value) is not int:
            return value
        return self._int(key, value, layers)

    def _list(self, key: str, values: list[Any], layers: dict[int, int]) -> Any:
        if not values:
            return values
        if len(values) in layers and len(values) > 4:
            count = layers[len(values)]
            if all(isinstance(x, str) for x in values):
                first = list(dict.fromkeys(values))
                # in the order in which they came first, then from the start
                return (first + values)[:count] if len(first) <= count else values[:count]
            return [self._value(key, x, {}) for x in values[:count]]
        if all(type(x) is int for x in values):
            if re.search(r"ind(ex|ice)|layer_ids|_idxs?$|cross_attention_layers|feature_layer", key) and layers:
                most = max(layers.values())
                return sorted({min(x, most - 1) for x in values})
            if re.search(r"depths|blocks|numb_of_layers|block_repeats", key):
                return [min(x, self.step.layers) for x in values]
            return [self._int(key, x, {}) for x in values]
        if all(isinstance(x, list) for x in values):
            return [self._list(key, x, {}) for x in values]
        return values

    def _int(self, key: str, value: int, layers: dict[int, int]) -> int:
        step = self.step
        if IDS.search(key):
            return value if value < 100 else self.ids.setdefault(value, 100 + len(self.ids))
        if VOCAB.search(key):
            return min(value, VOCABULARY)
        if POSITION.search(key):
            return min(value, POSITIONS) if step.width > 1 else value
        if PICTURE.search(key):
            return value // step.picture if value > 256 and value % (32 * step.picture) == 0 else value
        if key == "image_embedding_size":
            return value // step.picture
        if EXPERTS.search(key):
            return min(value, 8)
        if TOP_K.search(key):
            return min(value, 2)
        if key in ("n_group", "topk_group", "num_expert_group"):
            return 1
        if HEADS.search(key) and step.heads:
            return max(value // step.width, 1)
        if HEAD_WIDTH.search(key) and step.heads:
            return value
        if value in layers and LAYERS.search(key) and not NO_LAYERS.search(key):
            return layers[value]
        if value >= WIDEST and WIDTH.search(key) and not NO_WIDTH.search(key):
            small = -(-value // step.width)
            # kernels for experts want rows of whole vectors
            return max(small, 2) if small < WIDEST else -(-small // 8) * 8
        return value


def shrink(config: Any, step: Step, **changes: Any) -> Any:
    """A tiny config of the same class.

    Args:
        config: the published one.
        step: how far.
        changes: values that come last; a dict changes a part of the config.
    """
    widest = max((getattr(part, name, 0) for part in parts(config) for name in HIDDEN), default=0, key=_number)
    most = 1 << max(_number(widest) // WIDEST, 1).bit_length() - 1
    made = Shrinker(step._replace(width=min(step.width, most))).config(config.to_dict())
    _update(made, changes)
    return type(config).from_dict(made)


def _number(value: Any) -> int:
    return value if type(value) is int else max(value) if isinstance(value, list) and value else 0


def _update(values: dict[str, Any], changes: dict[str, Any]) -> None:
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(values.get(key), dict):
            _update(values[key], value)
        else:
            values[key] = value
