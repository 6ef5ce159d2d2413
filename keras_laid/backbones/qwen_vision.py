"""Lets Qwen 3.5 read images in a compiled step.

KerasHub's vision encoder runs Python loops over the values of
`"image_grid_thw"`, which a compiled step does not know. Here the images of a
batch have equally many patches, so that shapes say which patch belongs to which
image, and rows and columns are computed from the grid with tensors. A step
then also has the same size for one image and for hundreds.
"""

import contextlib
import functools
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping

import keras
from keras import ops
from keras_hub.models import Qwen3_5Backbone

from keras_laid.arguments import at_hand
from keras_laid.backbones.attention_capture import vision_indices
from keras_laid.backbones.decoder import backbone_of
from keras_laid.backbones.decoder import input_names
from keras_laid.backbones.decoder import replaced_method
from keras_laid.backbones.rotary_positions import rotary_embeddings_at
from keras_laid.typing import Tensor

GRID = "image_grid_thw"
ONE_SIZE = (
    "The images of a batch must have equally many patches each, and one frame: "
    "the patches of a prompt are shared out evenly over its images."
)
REMEDY = "Make images of one size, as `keras_laid.LongPrompts` does."


def reads_grids(model: keras.Model) -> bool:
    """Whether a model or backbone is a Qwen 3.5 with a vision encoder."""
    backbone = backbone_of(model)
    return isinstance(backbone, Qwen3_5Backbone) and (
        backbone.vision_encoder is not None
    )


@contextlib.contextmanager
def compiled_images(model: keras.Model) -> Iterator[None]:
    """Scope in which Qwen 3.5 reads images in a function that is compiled.

    Outputs are those of KerasHub, up to rounding. For other families nothing
    changes. On exit the model is as it was before.
    """
    if not reads_grids(model):
        yield
        return
    encoder = backbone_of(model).vision_encoder
    call = functools.partial(encoded, encoder, encoder.call)
    with contextlib.ExitStack() as stack:
        stack.enter_context(replaced_method(encoder, "call", call))
        for block in encoder.blocks:
            stack.enter_context(images_apart(block))
        yield


@contextlib.contextmanager
def images_apart(block: keras.layers.Layer) -> Iterator[None]:
    """Scope in which a block's patches attend those of the same image.

    The images are the first axis of the position embeddings.
    """
    call = functools.partial(attended, block.attn)
    with replaced_method(block.attn, "call", call):
        yield


def encoded(
    encoder: keras.Model,
    call: Callable[[Tensor, Tensor], Tensor],
    pixel_values: Tensor,
    grid: Tensor,
) -> Tensor:
    """Tokens of images, as the encoder's `call` computes them.

    Args:
        encoder: The vision encoder.
        call: Its own `call`.
        pixel_values: Float tensor of shape `(batch, patches, ...)`: the patches
            of all images of each prompt.
        grid: Integer tensor of shape `(batch, images, 3)`: 1, and the numbers
            of rows and columns of patches in each image.

    Returns:
        A float tensor of shape `(1, tokens, hidden_dim)`, for all prompts.
    """
    if 0 in (pixel_values.shape[1], grid.shape[1]):
        return call(pixel_values, grid)  # Prompts without images.
    patches = ops.shape(pixel_values)[1] // ops.shape(grid)[1]
    grid = ops.reshape(grid, (-1, 3))
    row, column = places(grid, patches, encoder.spatial_merge_size)
    x = encoder.patch_embed(
        ops.reshape(pixel_values, (-1, *pixel_values.shape[2:]))
    )
    x = ops.cast(x, "float32") + absolute_positions(encoder, grid, row, column)
    rotary = rotary_positions(encoder, patches, row, column)
    for block in encoder.blocks:
        x = block(x, rotary)
    return ops.expand_dims(encoder.merger(x), 0)


def places(
    grid: Tensor, patches: int | Tensor, merge: int
) -> tuple[Tensor, Tensor]:
    """Row and column of each patch, both of shape `(images, patches)`.

    The patches that become one token, `merge` by `merge` of them, follow each
    other.
    """
    index = ops.arange(patches, dtype="int32")[None]
    token, inside = index // merge**2, index % merge**2
    # Keras builds a model on grids of ones, whose rows have no token.
    tokens_in_row = ops.maximum(ops.cast(grid[:, 2:], "int32") // merge, 1)
    return (
        token // tokens_in_row * merge + inside // merge,
        token % tokens_in_row * merge + inside % merge,
    )


def absolute_positions(
    encoder: keras.Model, grid: Tensor, row: Tensor, column: Tensor
) -> Tensor:
    """Learned position embeddings, of shape `(images * patches, features)`.

    They form a square, which is stretched over each image; a patch gets a mean
    of the four around it.
    """
    last = encoder.num_grid_per_side - 1
    scale = last / ops.maximum(ops.cast(grid[:, 1:], "float32") - 1, 1)
    embedding: Tensor | float = 0.0
    for y, y_share in neighbours(row, scale[:, :1], last):
        for x, x_share in neighbours(column, scale[:, 1:], last):
            index = ops.reshape(y * encoder.num_grid_per_side + x, (-1,))
            share = ops.reshape(y_share * x_share, (-1, 1))
            embedding = embedding + encoder.pos_embed(index) * share
    return embedding + nan_where_wrong(grid, row)


def neighbours(
    place: Tensor, scale: Tensor, last: int
) -> list[tuple[Tensor, Tensor]]:
    """The two embeddings around a scaled place, and the share of each."""
    place = ops.cast(place, "float32") * scale
    low = ops.floor(place)
    index = ops.clip(ops.cast(low, "int32"), 0, last)
    after = ops.minimum(index + 1, last)
    return [(index, 1 - (place - low)), (after, place - low)]


def nan_where_wrong(grid: Tensor, row: Tensor) -> Tensor:
    """0 for each patch, or NaN where a grid is not that of an image.

    A compiled step cannot raise an error for a value; `check_grids` does where
    values can be read.
    """
    patches = ops.shape(row)[1]
    right = ops.equal(grid[:, 0] * grid[:, 1] * grid[:, 2], patches)
    right = ops.logical_and(right, ops.equal(grid[:, 0], 1))
    each = ops.where(right, 0.0, float("nan"))
    return ops.reshape(ops.repeat(each, patches), (-1, 1))


def rotary_positions(
    encoder: keras.Model, patches: int | Tensor, row: Tensor, column: Tensor
) -> tuple[Tensor, Tensor]:
    """Cosine and sine, both of shape `(images, patches, head_dim)`."""
    # No image has more rows or columns than patches.
    angle = encoder.rotary_pos_emb.get_freq_table(patches)
    angles = [ops.take(angle, each, axis=0) for each in (row, column)]
    angles = ops.concatenate(2 * angles, axis=-1)
    return ops.cos(angles), ops.sin(angles)


def attended(
    attention: keras.layers.Layer,
    x: Tensor,
    rotary: tuple[Tensor, Tensor],
    cu_seqlens: None = None,
) -> Tensor:
    """As the attention's `call`, by the images of `rotary`.

    Args:
        attention: The attention of a block of the encoder.
        x: Tensor of shape `(images * patches, hidden_size)`.
        rotary: The result of `rotary_positions`.
        cu_seqlens: Not used: images are equally long.
    """
    heads, head_dim = attention.num_heads, attention.head_dim
    flat = [ops.reshape(each, (-1, head_dim)) for each in rotary]
    query, key, value = ops.unstack(
        ops.reshape(attention.qkv(x), (-1, 3, heads, head_dim)), axis=1
    )
    query = attention._apply_rotary(query, *flat)
    key = attention._apply_rotary(key, *flat)
    patches = ops.shape(rotary[0])[1]
    output = ops.dot_product_attention(
        *(
            ops.reshape(each, (-1, patches, heads, head_dim))
            for each in (query, key, value)
        ),
        scale=head_dim**-0.5,
    )
    return attention.proj(ops.reshape(output, (-1, heads * head_dim)))


def positions_of(
    model: keras.Model, inputs: Mapping[str, Tensor]
) -> Tensor | None:
    """The positions in a batch, or `None` for the model's own.

    They are the entry `"positions"`. For Qwen 3.5 with images, the
    `"position_ids"` of its preprocessor, which its backbone does not read,
    stand for them.
    """
    if "positions" not in inputs and reads_grids(model):
        return inputs.get("position_ids")
    return inputs.get("positions")


def model_inputs(
    model: keras.Model, inputs: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Those of the entries that a model reads, as it reads them."""
    own = {name: inputs[name] for name in input_names(model)}
    if not reads_grids(model):
        return own
    own["vision_indices"] = vision_indices(inputs)
    # Keras does not take tensors and arrays together.
    return {name: ops.convert_to_tensor(value) for name, value in own.items()}


def hidden_states_of(
    backbone: Qwen3_5Backbone, inputs: Mapping[str, Tensor]
) -> Tensor:
    """Hidden states of prompts with images, at `inputs["positions"]`."""
    positions = inputs["positions"]
    with compiled_images(backbone), rotary_embeddings_at(backbone, positions):
        return backbone(model_inputs(backbone, inputs))


def check_image_shapes(
    model: keras.Model, inputs: Mapping[str, Tensor]
) -> None:
    """Refuses images of Qwen 3.5 that cannot be of one size, by their shapes.

    Raises:
        ValueError: If the inputs have no axis of prompts, or the patches of a
            prompt cannot be shared out evenly over its images.
    """
    if not reads_grids(model):
        return
    pixels, grid = inputs["pixel_values"].shape, inputs[GRID].shape
    if len(pixels) != 6 or len(grid) != 3:
        raise ValueError(
            f"`pixel_values` and `{GRID}` of Qwen 3.5 must have an axis of "
            "prompts: shapes `(batch, patches, ...)` and `(batch, images, 3)`. "
            f"Received: pixel_values.shape={tuple(pixels)}, "
            f"{GRID}.shape={tuple(grid)}. KerasHub's preprocessor puts the "
            "images of all prompts one after another: reshape its outputs, and "
            "`vision_indices` to `(batch, tokens)`."
        )
    if pixels[1] and grid[1] and pixels[1] % grid[1]:
        raise ValueError(
            f"{ONE_SIZE} Received: {pixels[1]} patches a prompt for {grid[1]} "
            f"images. {REMEDY}"
        )


def check_grids(inputs: Mapping[str, Tensor]) -> None:
    """Refuses grids that are not of images of one size, if they can be read.

    Raises:
        ValueError: If an image has another number of patches than the patches
            of a prompt, shared out over its images, or more than one frame.
    """
    if GRID not in inputs or not at_hand(inputs[GRID]):
        return
    patches, images = inputs["pixel_values"].shape[1], inputs[GRID].shape[1]
    sizes = ops.convert_to_numpy(inputs[GRID]).reshape(-1, 3)
    wrong = (sizes[:, 0] != 1) | (sizes.prod(axis=1) * images != patches)
    if wrong.any():
        raise ValueError(
            f"{ONE_SIZE} Received: {patches} patches a prompt for {images} "
            f"images, and {GRID} with {sizes[wrong][0].tolist()}. {REMEDY}"
        )
