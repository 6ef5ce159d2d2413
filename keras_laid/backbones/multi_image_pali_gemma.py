"""PaliGemma over several images."""

import functools
from collections.abc import Callable
from collections.abc import Sequence
from typing import Any
from typing import Self

import keras
import numpy as np
from keras import ops
from keras_hub.layers import PaliGemmaImageConverter
from keras_hub.models import PaliGemmaBackbone
from keras_hub.models import PaliGemmaCausalLM
from keras_hub.models import PaliGemmaCausalLMPreprocessor
from keras_hub.src.utils.pipeline_model import PipelineModel

from keras_laid.arguments import check_kind
from keras_laid.arguments import check_shape
from keras_laid.backbones.decoder import check_inputs
from keras_laid.backbones.decoder import check_values
from keras_laid.backbones.decoder import pali_gemma_backbone_of
from keras_laid.backbones.decoder import replaced_method
from keras_laid.backbones.gain_modulation import check_no_gains
from keras_laid.backbones.rotary_positions import rotary_embeddings_at
from keras_laid.backbones.text_length import generation_length
from keras_laid.backbones.text_length import training_length
from keras_laid.backbones.workers import BuiltBesideWorkers
from keras_laid.backbones.workers import check_workers
from keras_laid.typing import PathLike
from keras_laid.typing import Tensor


@keras.saving.register_keras_serializable(package="keras_laid")
class MultiImageConverter(PaliGemmaImageConverter):
    """Converts each image of a `(batch, images, height, width, 3)` array."""

    backbone_cls = None  # See `MultiImagePaliGemmaCausalLM.backbone_cls`.

    def call(self, inputs: Tensor) -> Tensor:
        if isinstance(inputs, (list, tuple)):
            inputs = stacked_images(inputs)
        shape = ops.shape(inputs)
        if len(shape) < 5:
            return super().call(inputs)
        flat = super().call(ops.reshape(inputs, (-1, *shape[-3:])))
        return ops.reshape(flat, (*shape[:2], *ops.shape(flat)[1:]))


def stacked_images(images: Sequence[Any]) -> np.ndarray:
    """Images of several prompts, or of one, as one array."""
    shapes = {np.shape(image) for image in keras.tree.flatten(images)}
    counts = [len(each) for each in images]
    if len(shapes) > 1 or len(set(counts)) > 1:
        raise ValueError(
            "All prompts of a call must have the same number of images, and "
            "all images the same shape. Received: "
            f"{counts} images, of shapes {sorted(shapes)}. Call once for each "
            "number of images."
        )
    return np.asarray(images)


@keras.saving.register_keras_serializable(package="keras_laid")
class MultiImagePaliGemmaCausalLM(BuiltBesideWorkers, PaliGemmaCausalLM):
    """A PaliGemma whose prompts hold several images.

    It shares every layer and weight with the PaliGemma it is made from:
    training one trains the other. Each image goes through the vision encoder on
    its own; the tokens of all images stand before the text in one sequence.
    With one image the outputs are those of
    `keras_hub.models.PaliGemmaCausalLM`. The number of images may differ from
    batch to batch.

    `save_to_preset` writes the preset of a plain PaliGemma, which
    `keras_hub.models.PaliGemmaCausalLM.from_preset` loads without keras_laid,
    and `MultiImagePaliGemmaCausalLM.from_preset` loads for several images. A
    file written by `save` loads only where keras_laid is imported.

    Masking: as in PaliGemma. Images and prompt attend each other in both
    directions; the response is causal.

    Args:
        backbone: A `keras_hub.models.PaliGemmaBackbone`.
        preprocessor: A `keras_hub.models.PaliGemmaCausalLMPreprocessor` or
            `None`. Defaults to `None`.
        **kwargs: Passed to `keras_hub.models.PaliGemmaCausalLM`.

    Call arguments:
        inputs: A dictionary with `"images"` of shape
            `(batch, images, height, width, 3)`; `"token_ids"`,
            `"padding_mask"`, `"response_mask"` of shape `(batch, length)`; and
            optionally `"positions"`, integers of shape
            `(batch, images * image_sequence_length + length)`, which replace
            `0, 1, 2, ...` in every rotary embedding.

    Returns:
        Logits of shape `(batch, length, vocabulary)`, for only the text.

    Raises:
        TypeError: If `preprocessor` is not a PaliGemma preprocessor.
        ValueError: If `backbone` is not a PaliGemma backbone; in a call, if an
            input is missing or has the wrong shape.

    Example:

    ```python
    pali_gemma = keras_hub.models.PaliGemmaCausalLM.from_preset("my_preset")
    model = keras_laid.MultiImagePaliGemmaCausalLM.from_causal_lm(pali_gemma)
    model.generate({"images": images, "prompts": ["Which image has a cat?"]})
    ```
    """

    # `keras_hub.models.CausalLM.from_preset` takes any class whose
    # `backbone_cls` fits. Without this line, it would sometimes load a
    # PaliGemma preset as this class.
    backbone_cls = None

    def __init__(
        self,
        backbone: PaliGemmaBackbone,
        preprocessor: PaliGemmaCausalLMPreprocessor | None = None,
        **kwargs: Any,
    ) -> None:
        if preprocessor is not None:
            preprocessor = multi_image_preprocessor(preprocessor)
        super().__init__(
            preprocessor=preprocessor,
            backbone=pali_gemma_backbone_of(backbone),
            **kwargs,
        )
        # It comes from KerasHub's graph, which is not run and has one image a
        # prompt.
        self.input_spec = None

    @classmethod
    def from_causal_lm(cls, causal_lm: PaliGemmaCausalLM) -> Self:
        """Makes one from a `keras_hub.models.PaliGemmaCausalLM`."""
        check_kind(
            "causal_lm",
            causal_lm,
            PaliGemmaCausalLM,
            "a `keras_hub.models.PaliGemmaCausalLM`",
            "Hand a backbone to the constructor.",
        )
        return cls(causal_lm.backbone, causal_lm.preprocessor)

    @classmethod
    def from_preset(
        cls, preset: str, load_weights: bool = True, **kwargs: Any
    ) -> Self:
        """Loads a PaliGemma preset; arguments as in KerasHub."""
        return cls.from_causal_lm(
            PaliGemmaCausalLM.from_preset(preset, load_weights, **kwargs)
        )

    def save_to_preset(
        self, preset_dir: PathLike, max_shard_size: float = 10
    ) -> None:
        """Writes a plain PaliGemma preset; arguments as in KerasHub."""
        check_no_gains(self, preset_dir)
        preprocessor = self.preprocessor
        if preprocessor is not None:
            preprocessor = with_converter(preprocessor, PaliGemmaImageConverter)
        plain = PaliGemmaCausalLM(
            preprocessor=preprocessor, backbone=self.backbone
        )
        plain.save_to_preset(preset_dir, max_shard_size)

    def call(
        self,
        inputs: dict[str, Tensor],
        training: bool | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        x = self.hidden_states(inputs)
        return self.backbone.token_embedding(x, reverse=True)

    def hidden_states(self, inputs: dict[str, Tensor]) -> Tensor:
        """The states that logits are read from, `(batch, length, hidden)`."""
        backbone = self.backbone
        check_inputs(self, inputs)
        check_values(self)
        batch = inputs["token_ids"].shape[0]
        image_embeddings = self.encode_images(inputs["images"], batch)
        text_embeddings = self.embed_text(inputs["token_ids"])
        x = ops.concatenate((image_embeddings, text_embeddings), axis=1)
        with rotary_embeddings_at(backbone, inputs.get("positions")):
            for block in backbone.transformer_layers:
                x = block(
                    x,
                    padding_mask=inputs["padding_mask"],
                    response_mask=inputs["response_mask"],
                )
        # Only the text gets logits: those of the images would cost the most.
        return backbone.layer_norm(x[:, ops.shape(image_embeddings)[1] :])

    # KerasHub's `fit`, `evaluate` and `predict` read only arrays and tf.data,
    # which they preprocess. Here they also read a `PyDataset`, whose batches
    # count as already preprocessed.

    def fit(
        self, x: Any = None, *args: Any, **kwargs: Any
    ) -> keras.callbacks.History:
        check_examples_fit(self.preprocessor, x)
        check_workers(x, kwargs)
        return _trainer(self, x).fit(x, *args, **kwargs)

    def evaluate(self, x: Any = None, *args: Any, **kwargs: Any) -> Any:
        check_examples_fit(self.preprocessor, x)
        return _trainer(self, x).evaluate(x, *args, **kwargs)

    def predict(self, x: Any = None, *args: Any, **kwargs: Any) -> np.ndarray:
        check_examples_fit(self.preprocessor, x)
        return _trainer(self, x).predict(x, *args, **kwargs)

    def make_generate_function(self) -> Callable[..., dict[str, Tensor]]:
        check_values(self)
        return super().make_generate_function()

    def generate(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Answers prompts in words; see `keras_hub.models.CausalLM.generate`.

        Args:
            inputs: A dictionary with `"images"`, an array of shape
                `(batch, images, height, width, 3)`, and `"prompts"`, a list of
                `batch` strings; or, for one prompt, an array of shape
                `(images, height, width, 3)` and a string; or a
                `tf.data.Dataset` of such batches. All prompts of a call have
                the same number of images.
            *args: Positional arguments of KerasHub's `generate`, such as
                `max_length`.
            **kwargs: Keyword arguments of KerasHub's `generate`.

        Returns:
            A list of strings, or a string.

        Raises:
            ValueError: If prompts differ in their number of images, or if a
                prompt leaves no room for an answer in `max_length` tokens.
                KerasHub would cut such a prompt.
        """
        if self.preprocessor is None:
            return super().generate(inputs, *args, **kwargs)
        preprocess = functools.partial(preprocess_whole, self.preprocessor)
        with replaced_method(
            self.preprocessor, "generate_preprocess", preprocess
        ):
            return super().generate(inputs, *args, **kwargs)

    def compute_output_shape(
        self, input_shape: dict[str, Sequence[int | None]]
    ) -> tuple[int | None, ...]:
        return (*input_shape["token_ids"], self.backbone.vocabulary_size)

    def encode_images(self, images: Tensor, batch: int | None = None) -> Tensor:
        """Encodes images as embeddings of shape `(batch, tokens, hidden)`."""
        size = self.backbone.image_size
        check_shape(
            "images",
            images,
            batch=batch,
            images=None,
            height=size,
            width=size,
            channels=3,
        )
        if images.shape[1] == 0:
            raise ValueError(
                "A prompt must have at least one image. "
                f"Received: images.shape={tuple(images.shape)}"
            )
        batch = ops.shape(images)[0]
        flat = ops.reshape(images, (-1, *images.shape[2:]))
        encoded = self.backbone.vit_encoder(flat)
        tokens = -1  # If the number of images is known only at run time.
        if images.shape[1] is not None:
            tokens = images.shape[1] * self.backbone.image_sequence_length
        return ops.reshape(encoded, (batch, tokens, self.backbone.hidden_dim))

    def embed_text(self, token_ids: Tensor) -> Tensor:
        """Embeds tokens as `(batch, length, hidden)`, scaled as in Gemma."""
        x = self.backbone.token_embedding(token_ids)
        return x * ops.cast(ops.sqrt(self.backbone.hidden_dim), x.dtype)

    def generate_step(
        self,
        inputs: dict[str, Tensor],
        stop_token_ids: Sequence[int] | None = None,
    ) -> dict[str, Tensor]:
        token_ids = inputs["token_ids"]
        padding_mask = inputs["padding_mask"]
        images = inputs["images"]
        if len(images.shape) == 4:  # One prompt, without its batch axis.
            images = ops.expand_dims(images, axis=0)
        image_embeddings = self.encode_images(images)
        image_length = ops.shape(image_embeddings)[1]
        batch, length = ops.shape(token_ids)
        backbone = self.backbone
        cache = ops.zeros(
            (
                batch,
                backbone.num_layers,
                2,
                image_length + length,
                backbone.num_key_value_heads,
                backbone.head_dim,
            ),
            dtype=self.compute_dtype,
        )
        _, hidden_states, cache = self.call_with_cache(
            token_ids,
            cache,
            0,
            img_embeddings=image_embeddings,
            padding_mask=padding_mask,
        )

        def next(
            prompt: Tensor, cache: Tensor, index: Tensor
        ) -> tuple[Tensor, Tensor, Tensor]:
            last = ops.slice(prompt, (0, index - 1), (batch, 1))
            logits, hidden_states, cache = self.call_with_cache(
                last, cache, image_length + index - 1
            )
            return logits[:, 0], hidden_states[:, 0], cache

        prompt_lengths = ops.sum(ops.cast(padding_mask, "int32"), axis=-1)
        token_ids = self.sampler(
            next=next,
            prompt=token_ids,
            cache=cache,
            index=ops.min(prompt_lengths),
            mask=padding_mask,
            stop_token_ids=stop_token_ids,
            hidden_states=hidden_states,
            model=self,
        )
        generated = ops.ones_like(token_ids, dtype="bool")
        if stop_token_ids is not None:
            # Keep the first stop token of each response; mask all later tokens.
            stops = ops.zeros_like(generated)
            for stop in stop_token_ids:
                stops = ops.logical_or(stops, ops.equal(token_ids, stop))
            stops = ops.cast(
                ops.logical_and(stops, ops.logical_not(padding_mask)), "int32"
            )
            generated = ops.equal(ops.cumsum(stops, axis=-1), stops)
        return {
            "token_ids": token_ids,
            "padding_mask": generated,
            "images": images,
        }


def _trainer(model: MultiImagePaliGemmaCausalLM, x: Any) -> Any:
    """The model whose `fit`, `evaluate` and `predict` can read `x`."""
    check_values(model)
    if isinstance(x, keras.utils.PyDataset):
        return super(PipelineModel, model)
    return super(MultiImagePaliGemmaCausalLM, model)


def preprocess_whole(
    preprocessor: PaliGemmaCausalLMPreprocessor,
    x: dict[str, Any],
    sequence_length: int | None = None,
) -> dict[str, Tensor]:
    """Runs the preprocessor's `generate_preprocess`; refuses to cut prompts."""
    length = sequence_length or preprocessor.sequence_length
    needed = generation_length(preprocessor, x)
    if needed > length:
        raise ValueError(
            "`max_length`, by default `preprocessor.sequence_length`, must "
            "have room for each prompt and one token of its answer. "
            f"Received: max_length={length}, and prompts that need {needed}. "
            f"Pass `max_length={needed}` or more."
        )
    return type(preprocessor).generate_preprocess(
        preprocessor, x, sequence_length=sequence_length
    )


def check_examples_fit(
    preprocessor: PaliGemmaCausalLMPreprocessor | None, x: Any
) -> None:
    """Refuses prompts and responses, as strings, that would be cut."""
    if preprocessor is None or not isinstance(x, dict) or "prompts" not in x:
        return
    needed = training_length(preprocessor, x["prompts"], x["responses"])
    if needed > preprocessor.sequence_length:
        raise ValueError(
            "`preprocessor.sequence_length` must have room for each prompt "
            "with its response. Received: sequence_length="
            f"{preprocessor.sequence_length}, and examples that need {needed}. "
            f"Set `model.preprocessor.sequence_length = {needed}`."
        )


def multi_image_preprocessor(
    preprocessor: PaliGemmaCausalLMPreprocessor,
) -> PaliGemmaCausalLMPreprocessor:
    """A PaliGemma preprocessor whose prompts hold several images."""
    check_kind(
        "preprocessor",
        preprocessor,
        PaliGemmaCausalLMPreprocessor,
        "a `keras_hub.models.PaliGemmaCausalLMPreprocessor` or `None`",
    )
    return with_converter(preprocessor, MultiImageConverter)


def with_converter(
    preprocessor: PaliGemmaCausalLMPreprocessor,
    converter_class: type[PaliGemmaImageConverter],
) -> PaliGemmaCausalLMPreprocessor:
    """The same preprocessor with another class of image converter."""
    converter = preprocessor.image_converter
    return PaliGemmaCausalLMPreprocessor(
        tokenizer=preprocessor.tokenizer,
        image_converter=converter
        and converter_class.from_config(converter.get_config()),
        sequence_length=preprocessor.sequence_length,
        add_start_token=preprocessor.add_start_token,
        add_end_token=preprocessor.add_end_token,
    )


def several_images(model: keras.Model) -> keras.Model:
    """A PaliGemma that takes several images, or any other model unchanged.

    Args:
        model: A `keras_hub.models.CausalLM`. A PaliGemma is wrapped in a
            `keras_laid.MultiImagePaliGemmaCausalLM`, which shares its layers
            and weights; models of other families take several images already.

    Returns:
        A `keras_hub.models.CausalLM`.
    """
    if isinstance(model, PaliGemmaCausalLM):
        return MultiImagePaliGemmaCausalLM.from_causal_lm(model)
    return model
