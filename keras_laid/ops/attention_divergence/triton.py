"""The divergence in fused kernels for torch on CUDA."""

from typing import NamedTuple

import torch
import triton

from keras_laid.ops.attention_divergence import triton_kernels
from keras_laid.ops.fused_attention import tiles
from keras_laid.ops.fused_attention import triton as kernels


class Call(NamedTuple):
    """The arguments without a gradient, except for the teacher's."""

    places: kernels.Places
    student: tiles.Spec
    teacher: tiles.Spec
    scale: float
    teacher_scale: float
    window: int | None
    exponent: float
    item_size: int  # Bytes of a number; the larger of the two models'.

    def form(self, kernel, own, mixture):
        """The constants of a kernel whose programs keep tiles of `own`."""
        batch, length, heads, _ = own.shape
        return triton_kernels.Form(
            self.student,
            self.teacher,
            self.window,
            self.exponent,
            tiles.choose_tiles(
                kernel,
                max(self.student.width, self.teacher.width),
                batch * length * heads,
                self.item_size,
                mixture is not None,
            ),
            over_rows=kernel == "key",
        )


class Divergence(torch.autograd.Function):
    """The kernels, with a gradient for student and mixture."""

    @staticmethod
    def forward(
        ctx,
        student_query,
        student_key,
        mixture,
        teacher_query,
        teacher_key,
        call,
    ):
        form = call.form("forward", student_query, mixture)
        sides = (student_query, student_key, teacher_query, teacher_key)
        batch, rows = student_query.shape[:2]
        keys = student_key.shape[1]
        count = triton.cdiv(rows, form.tiles.rows)
        normalizer, divergence, center = (
            kernels.empty_rows(student_query) for _ in range(3)
        )
        teacher_normalizer = kernels.empty_rows(teacher_query)
        if mixture is not None:
            kernels.launch(
                triton_kernels.normalizer_kernel,
                form,
                (count, batch * form.teacher.heads),
                *descriptors(form, None, sides)[2:],
                teacher_normalizer,
                call.teacher_scale,
                call.places,
                rows,
                keys,
            )
        kernels.launch(
            triton_kernels.forward_kernel,
            form,
            (count, batch * form.student.heads),
            *descriptors(form, mixture, sides),
            normalizer,
            teacher_normalizer,
            call.scale,
            call.teacher_scale,
            mixture,
            call.places,
            rows,
            keys,
            divergence,
            center,
        )
        normalizers = normalizer, teacher_normalizer
        ctx.save_for_backward(*sides, *normalizers, mixture, center)
        ctx.call = call
        return divergence[..., :rows]

    @staticmethod
    def backward(ctx, upstream):
        call = ctx.call
        *sides, normalizer, teacher_normalizer, mixture, center = (
            ctx.saved_tensors
        )
        batch, rows = sides[0].shape[:2]
        keys = sides[1].shape[1]
        upstream = kernels.fill(upstream)
        models = (
            normalizer,
            teacher_normalizer,
            call.scale,
            call.teacher_scale,
            mixture,
            call.places,
        )
        form = call.form("query", sides[0], mixture)
        count = triton.cdiv(rows, form.tiles.rows)
        query_gradient = torch.empty_like(sides[0])
        mixture_gradient = None
        if mixture is not None:
            mixture_gradient = mixture.new_empty(
                (*center.shape[:2], count, mixture.shape[1])
            )
        kernels.launch(
            triton_kernels.query_gradient_kernel,
            form,
            (count, batch * form.student.heads),
            *descriptors(form, mixture, sides),
            *models,
            rows,
            keys,
            center,
            upstream,
            kernels.descriptor(query_gradient, form.tiles.rows),
            mixture_gradient,
        )
        form = call.form("key", sides[1], mixture)
        key_gradient = torch.empty_like(sides[1])
        kernels.launch(
            triton_kernels.key_gradient_kernel,
            form,
            (
                triton.cdiv(keys, form.tiles.keys),
                batch * form.student.key_heads,
            ),
            *descriptors(form, mixture, sides),
            *models,
            kernels.first_rows(call.places, form, keys),
            rows,
            keys,
            center,
            upstream,
            kernels.descriptor(key_gradient, form.tiles.keys),
        )
        if mixture is not None:
            mixture_gradient = mixture_gradient.sum((0, 2))
        return query_gradient, key_gradient, mixture_gradient, None, None, None


def descriptors(form, mixture, sides):
    """Queries and keys in the form in which a kernel reads them."""
    student_query, student_key, teacher_query, teacher_key = sides
    rows, keys = form.tiles.rows, form.tiles.keys

    def read(tensor, size, is_own):
        if is_own:
            return kernels.own_tile(tensor, size, form)
        return kernels.descriptor(tensor, size)

    paired = mixture is None  # Mixtures read the teacher's heads in a loop.
    return (
        read(student_query, rows, not form.over_rows),
        read(student_key, keys, form.over_rows),
        read(teacher_query, rows, paired and not form.over_rows),
        read(teacher_key, keys, paired and form.over_rows),
    )


def attention_divergence(student, teacher, mask, distance, mixture):
    places = kernels.find_places(mask, distance, student.query.shape[0])
    student, teacher = (
        side._replace(
            query=kernels.readable(side.query), key=kernels.readable(side.key)
        )
        for side in (student, teacher)
    )
    call = Call(
        places,
        tiles.Spec.from_attention(student),
        tiles.Spec.from_attention(teacher),
        float(student.scale),
        float(teacher.scale),
        mask.window,
        float(distance.exponent),
        max(side.query.element_size() for side in (student, teacher)),
    )
    return Divergence.apply(*student[:2], mixture, *teacher[:2], call)
