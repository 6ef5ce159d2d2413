"""Memory of each device for distilling PaliGemma 2, computed from shapes.

    python -m benchmarks.memory_plan

Prints the plans and writes a new `benchmarks/results/memory_plan.csv`. No
weight is allocated.
"""

import functools

import keras_hub

import keras_laid
from benchmarks import rows
from benchmarks.markdown import markdown_table

PATH = rows.RESULTS / "memory_plan.csv"
# From the models' published configurations.
COMMON = dict(
    vocabulary_size=257152,
    image_size=224,
    vit_patch_size=14,
    vit_num_heads=16,
    vit_hidden_dim=1152,
    vit_num_layers=27,
    vit_intermediate_dim=4304,
    use_post_ffw_norm=True,
    use_post_attention_norm=True,
    final_logit_soft_cap=30,
    attention_logit_soft_cap=50,
    use_sliding_window_attention=True,
    sliding_window_size=4096,
)
SHAPES = {
    "3B": dict(
        num_layers=26,
        num_query_heads=8,
        num_key_value_heads=4,
        hidden_dim=2304,
        intermediate_dim=18432,
        head_dim=256,
    ),
    "10B": dict(
        num_layers=42,
        num_query_heads=16,
        num_key_value_heads=8,
        hidden_dim=3584,
        intermediate_dim=28672,
        head_dim=256,
    ),
    "28B": dict(
        num_layers=46,
        num_query_heads=32,
        num_key_value_heads=16,
        hidden_dim=4608,
        intermediate_dim=73728,
        head_dim=128,
    ),
}
DEVICES = {  # Mesh and bytes of each device.
    "8 x 80 GB": ((2, 4), 80e9),
    "TPU v5e-16": ((1, 16), 16e9),
}
IMAGES = 32  # Of 256 tokens.


def table():
    """Gigabytes of each part of each plan."""
    columns = {
        "teacher: weights": "teacher",
        "student: weights": "student",
        "student: gradients": "gradients",
        "student: optimizer": "optimizer",
        "student: what blocks are given": "block inputs",
        "one block at work": "one block",
        "logits": "logits",
        "total": "total",
    }
    lines = []
    for row in rows.read("memory_plan"):
        mesh = row["mesh_shape"].strip("()").replace(", ", " x ")
        gigabytes = [f"{float(row[name]) / 1e9:.1f}" for name in columns]
        lines.append([f"{row['pair']}, {row['devices']}", mesh, *gigabytes])
    return markdown_table(["", "mesh", *columns.values()], lines)


TABLES = {"memory_plan": table}


def main():
    PATH.unlink(missing_ok=True)
    for name, (mesh_shape, memory) in DEVICES.items():
        for size in ("10B", "28B"):
            teacher, student = (
                functools.partial(
                    keras_hub.models.PaliGemmaBackbone,
                    **COMMON,
                    **SHAPES[each],
                )
                for each in (size, "3B")
            )
            settings = dict(
                image_tokens=256 * IMAGES,
                text_tokens=128,
                batch_size=mesh_shape[0],
                mesh_shape=mesh_shape,
                memory=memory,
            )
            plan = keras_laid.plan(teacher, student, **settings)
            print(f"PaliGemma 2 {size} -> 3B on {name}\n{plan}\n", flush=True)
            rows.append_row(
                PATH,
                dict(pair=f"{size} -> 3B", devices=name, **settings)
                | plan.parts
                | dict(total=plan.total, fits=plan.fits, commit=rows.commit()),
            )


if __name__ == "__main__":
    main()
