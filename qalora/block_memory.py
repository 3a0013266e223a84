"""What one block of a decoder keeps for its backward, and what is alive at the worst moments of that. Torch-free.

input → norm → mixer: attention, a gated delta net or a short convolution → norm → MLP → output
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qalora.base.registry import ModelShape
from qalora.sizes import FP32_TEMPORARY, QUANT_BLOCK

FP32 = 4
DELTA_CHUNK = 64  # tokens of a gated delta net that are computed at once
GROUPED = 256  # elements of a head up to which queries share keys and values without copies of them
PER_LAYER = "per_layer_input_gate"
MIXERS = ("self_attn", "linear_attn", "conv")


@dataclass(frozen=True)
class MicroBatch:
    """What blocks compute with.

    Attributes:
        tile: tokens of a row that an MLP works on at a time.
        size: bytes of an element of the compute dtype.
        mask: bytes of an element of dropout's mask; 0 without dropout.
        packed: a row holds several texts, which attention tells apart by a mask over all pairs of tokens.
    """

    rows: int
    seq_len: int
    tile: int
    size: int
    mask: int
    packed: bool
    load_in_4bit: bool
    device: str

    @property
    def tokens(self) -> int:
        return self.rows * self.seq_len

    @property
    def tiled(self) -> bool:
        return self.tile < self.seq_len

    def wide(self, tokens: int, width: int) -> int:
        """An fp32 temporary beside a tensor of the compute dtype."""
        return min(FP32_TEMPORARY, FP32 * tokens * width)


@dataclass(frozen=True)
class Layer:
    """A linear layer of a block: its name there, its sizes, and its adapter's rank."""

    name: str
    fan_in: int
    fan_out: int
    rank: int

    @property
    def part(self) -> str:
        """What of the block it belongs to; nothing, of a layer that stands by itself."""
        return self.name.rpartition(".")[0]

    @property
    def kind(self) -> str:
        return self.name.rpartition(".")[2]


@dataclass(frozen=True)
class BlockMemory:
    """Bytes of one block.

    Attributes:
        inside: what its backward needs, its input included.
        unread: of that, the input where a norm alone reads it. The first block's needs no gradient, so its norm does
            not keep it.
        copied: of that, what a norm makes of its input, and in the first block does not keep either.
        outputs: what its linear layers put out, and their A x: what "selective" keeps beside the input.
        working: alive beside its input at the worst moment of its backward, all that this needs included.
        mixing: the same while its mixer goes backward; 0 where that is less for certain.
    """

    inside: int
    unread: int
    copied: int
    outputs: int
    working: int
    mixing: int


def blocks_of(shape: ModelShape, blocks: Sequence[tuple[Layer, ...]], batch: MicroBatch) -> list[BlockMemory]:
    """Of each block, first to last.

    Args:
        blocks: of `layers_of`.
    """
    alike: dict[tuple[tuple[Layer, ...], bool], BlockMemory] = {}
    found = []
    for index, layers in enumerate(blocks):
        kind = layers, takes_mask(shape, batch, index)
        if kind not in alike:
            alike[kind] = block_memory(shape, *kind, batch)
        found.append(alike[kind])
    return found


def layers_of(shape: ModelShape, ranks: Mapping[str, int]) -> list[tuple[Layer, ...]]:
    """The linear layers of each block.

    Args:
        ranks: full module name → rank.
    """
    blocks: dict[str, list[Layer]] = {}
    for name, (fan_in, fan_out) in shape.linear_maps().items():
        index, _, own = name.split(".layers.")[1].partition(".")
        blocks.setdefault(index, []).append(Layer(own, fan_in, fan_out, ranks.get(name, 0)))
    return [tuple(layers) for layers in blocks.values()]


def block_memory(shape: ModelShape, layers: tuple[Layer, ...], masked: bool, batch: MicroBatch) -> BlockMemory:
    """
    Args:
        masked: its attention takes a mask.
    """
    d, tokens, size, kept = shape.hidden_size, batch.tokens, batch.size, shape.family.kept
    norms, _ = shape.family.norms
    ranks = sum(layer.rank for layer in layers)
    mixer, mlp = mixer_of(shape, layers, masked, batch), mlp_of(shape, layers, batch)
    hidden = tokens * d * size
    # What norms put out, their scales, and the sum in the middle, which a norm reads.
    normed = (norms + (norms > 1)) * hidden + norms * tokens * FP32 * (1 + kept.norm * d)
    dropped = _dropped(layers, mlp.width, batch)
    read = 0 if kept.norm else hidden  # a norm of ours keeps what it reads, another one copies of that
    own_rotation = kept.expanded * 2 * tokens * shape.head_dim * size
    around = dropped + normed + own_rotation + mixer.kept + FP32 * tokens * ranks
    held = [
        layer for layer in layers if not (layer in mlp.layers and (batch.tiled or (mlp.fused and layer == mlp.down)))
    ]
    # A norm that is computed in one stretch puts its gradient nowhere but in an fp32 temporary.
    norm = (1 if FP32 * tokens * d <= FP32_TEMPORARY else 2) * hidden + 3 * batch.wide(tokens, d)
    # The largest B, of which a backward makes a transposed copy.
    transposed = max((FP32 * layer.rank * layer.fan_out for layer in layers), default=0)
    return BlockMemory(
        inside=read + around + (0 if batch.tiled else mlp.kept) + _per_layer(shape, layers, batch),
        unread=0 if shape.family.mlp_normed else read,
        copied=tokens * FP32 * kept.norm * d,
        outputs=tokens * sum(size * layer.fan_out + FP32 * layer.rank for layer in held),
        working=around + kept.gradients * hidden + max(mlp.backward, norm) + transposed,
        mixing=mixer.backward and mixer.backward + 2 * hidden + tokens * FP32 * (1 + ranks),
    )


# ---------------------------------------------------------------------------------------------------------------- MLPs


@dataclass(frozen=True)
class Mlp:
    """
    Attributes:
        fused: it is one node of ours (kernels/swiglu.py).
        kept: what it keeps beside its input.
        backward: alive while it goes backward, of that and beside it.
    """

    layers: tuple[Layer, ...]
    down: Layer | None
    width: int
    fused: bool
    kept: int
    backward: int


def mlp_of(shape: ModelShape, layers: tuple[Layer, ...], batch: MicroBatch) -> Mlp:
    d, tile, size, facts = shape.hidden_size, batch.rows * min(batch.seq_len, batch.tile), batch.size, shape.family.kept
    own = tuple(layer for layer in layers if layer.part and layer.part not in MIXERS)
    down = max((layer for layer in own if layer.fan_out == d), key=lambda layer: layer.fan_in, default=None)
    width = shape.intermediate_size if down is None else down.fan_in
    gated, fused = sum(layer.fan_out for layer in own if layer != down) != width, shape.family.mlp is not None
    inner, hidden = tile * width * size, batch.tokens * d * size
    # gate x and up x, into which the backward of ours writes its gradients; else what is made of them too
    held = 2 * inner if fused else (1 + 2 * gated + facts.activation) * inner
    weight = d * width * size + d * width // QUANT_BLOCK * FP32 if batch.load_in_4bit else 0
    # Beside the gradient of the product: a dequantized weight, or fp32 copies of what down reads, or more gradients.
    wide, rounds = batch.wide(tile, width), size < FP32
    if fused:
        beside = max(
            weight + min(hidden, tile * d * size), wide * (3 if rounds else 2) // 2 + rounds * batch.wide(tile, d)
        )
    else:
        gone = hidden if shape.family.norms[0] > 2 else 0  # the gradient of what a norm after the MLP reads
        beside = max(weight, rounds * (wide + batch.wide(tile, d)), facts.inner_gradients * inner - gone)
    if batch.tiled:  # gradients of the whole input, and of our adapters a tile's beside the sum of those before
        beside += hidden + fused * 2 * FP32 * sum(layer.rank * (layer.fan_in + layer.fan_out) for layer in own)
    return Mlp(own, down, width, fused, held + facts.signs * tile * width, held + inner + hidden + beside)


def _per_layer(shape: ModelShape, layers: tuple[Layer, ...], batch: MicroBatch) -> int:
    """What a block keeps of its own input of a layer, which comes in after the MLP."""
    width = sum(layer.fan_out for layer in layers if layer.name == PER_LAYER)
    return width and batch.tokens * batch.size * (2 * shape.hidden_size + 3 * width)


def _dropped(layers: tuple[Layer, ...], width: int, batch: MicroBatch) -> int:
    """With dropout every adapter has an input of its own, and an MLP of ours keeps silu(gate x) and the product too."""
    if not batch.mask:
        return 0
    read = sum(layer.fan_in for layer in layers if layer.rank)
    return batch.tokens * (read * (batch.size + batch.mask) + 2 * width * batch.size)


# -------------------------------------------------------------------------------------------------------------- mixers


@dataclass(frozen=True)
class Mixer:
    """
    Attributes:
        kept: what it keeps beside its input.
        backward: alive while it goes backward, all of that included; 0 where that is less than the MLP's for certain.
    """

    kept: int
    backward: int = 0


def mixer_of(shape: ModelShape, layers: tuple[Layer, ...], masked: bool, batch: MicroBatch) -> Mixer:
    parts = {layer.part for layer in layers}
    if "linear_attn" in parts:
        return _delta_net(shape, layers, batch)
    if "conv" in parts:
        # What goes in, three times the hidden size, and the product, the convolution and the product after it.
        return Mixer(6 * batch.tokens * shape.hidden_size * batch.size)
    return _attention(shape, layers, masked, batch)


def _attention(shape: ModelShape, layers: tuple[Layer, ...], masked: bool, batch: MicroBatch) -> Mixer:
    """q, k, v, its output and log-sums; q and k twice, where a norm or a rotation puts out others."""
    size, heads, facts = batch.size, shape.num_attention_heads, shape.family.kept
    out = {layer.kind: layer.fan_out for layer in layers if layer.part == "self_attn"}
    into = {layer.kind: layer.fan_in for layer in layers if layer.part == "self_attn"}
    q = into.get("o_proj") or into.get("out_proj") or heads * shape.head_dim
    kv = out.get("k_proj", (out.get("qkv_proj", q) - q) // 2)
    _, inner_norms = shape.family.norms
    of_token = size * 2 * (q + kv) + FP32 * heads
    # Whether keys and values are copied for each head of queries. What a fused layer put out is let go then.
    repeated = q > kv and not shape.family.eager and (masked or q // heads > GROUPED)
    if inner_norms or (shape.family.copies_qk and not repeated):
        of_token += size * (q + kv * (2 if facts.normed_v else 1))
    if shape.use_qk_norm:
        of_token += FP32 * facts.norm * (q + kv)
    if out.get("q_proj") == 2 * q:  # and a gate of what attention puts out: itself twice, its sigmoid, and the product
        of_token += size * 4 * q
    of_token += size * q * facts.copied
    of_token += size * 2 * (q - kv) * repeated
    kept = batch.tokens * of_token + masked * _mask_of_block(shape, batch)
    if shape.family.eager:  # gradients of both in fp32, when what softmax put out in 16 bits is gone
        pairs = batch.rows * batch.seq_len**2 * heads
        return Mixer(kept, kept + pairs * (2 * FP32 - (size if size < FP32 else 0)))
    backward = size * 4 * (q + kv) + FP32 * heads + _scratch(q, kv, heads, size)
    return Mixer(kept, 0 if batch.device == "cpu" else batch.tokens * backward)


def _scratch(q: int, kv: int, heads: int, size: int) -> int:
    """Bytes a token that the backward of a fused attention on CUDA takes beside what it puts out (FlashAttention-2:
    dq and sums in fp32, and under grouped queries dk and dv of all of them)."""
    return FP32 * (q + heads) + (2 * size * q if kv != q else 0)


def _delta_net(shape: ModelShape, layers: tuple[Layer, ...], batch: MicroBatch) -> Mixer:
    """As transformers computes it in torch, in fp32; flash-linear-attention takes less."""
    out = {layer.kind: layer.fan_out for layer in layers if layer.part == "linear_attn"}
    convolved, value, heads = out["in_proj_qkv"], out["in_proj_z"], out["in_proj_b"]
    key = heads * (shape.linear_key_head_dim or 0)  # of as many heads as the values have
    pairs, states = DELTA_CHUNK * heads, value * key // heads // DELTA_CHUNK
    keys = 8 if batch.size < FP32 else 12  # those that are in fp32 already lie otherwise, and are copied for products
    of_token = batch.size * 2 * (convolved + value) + FP32 * (5 * pairs + keys * key + 6 * value + states)
    return Mixer(batch.tokens * of_token)


# ------------------------------------------------------------------------------------------------- positions and masks


def takes_mask(shape: ModelShape, batch: MicroBatch, block: int) -> bool:
    windowed = shape.sliding_window is not None and block in shape.windowed and batch.seq_len > shape.sliding_window
    return shape.family.eager or batch.packed or windowed


def _mask_of_block(shape: ModelShape, batch: MicroBatch) -> int:
    pairs = batch.rows * batch.seq_len**2
    if shape.family.eager:  # capped scores, and what softmax makes of them in fp32
        return 8 * pairs * shape.num_attention_heads
    return pairs * batch.size  # the mask as numbers to add


@dataclass(frozen=True)
class Beside:
    """Bytes that are alive beside the blocks until the first one goes backward.

    Attributes:
        all_along: cosines and sines, masks, and inputs of each block of its own.
        keys: keys and values for later blocks, which the block that made them keeps where nothing is computed again.
        gradients: of these, while a block goes backward, first to last.
    """

    all_along: int
    keys: int
    gradients: tuple[int, ...]


def beside_blocks(shape: ModelShape, blocks: Sequence[tuple[Layer, ...]], batch: MicroBatch) -> Beside:
    of_element = batch.tokens * batch.size
    rotation = shape.family.kept.rotations * 2 * of_element * shape.head_dim
    own, stored, takers = 0, {}, []  # kind of attention → the width of its last keys; who takes keys of which kind
    for block, layers in enumerate(blocks):
        out, kind = {layer.name: layer.fan_out for layer in layers}, block in shape.windowed
        own += out.get(PER_LAYER, 0)
        if "self_attn.k_proj" in out:
            stored[kind] = 2 * out["self_attn.k_proj"]
        elif "self_attn.q_proj" in out:
            takers.append((block, kind))

    def taken(after: int) -> int:
        return of_element * sum(stored[kind] for kind in {kind for block, kind in takers if block > after})

    all_along = rotation + _mask_of_step(shape, batch) + of_element * own
    return Beside(all_along, taken(-1), tuple(map(taken, range(shape.num_hidden_layers))))


def _mask_of_step(shape: ModelShape, batch: MicroBatch) -> int:
    """Which pairs may see each other, of each kind of attention that asks for it."""
    pairs = batch.rows * batch.seq_len**2
    if shape.family.eager:
        return 2 * pairs * batch.size
    blocks = range(shape.num_hidden_layers)
    return pairs * len({block in shape.windowed for block in blocks if takes_mask(shape, batch, block)})
