"""Tables of measurements in the project's texts, from their rows."""

import collections
import itertools

import numpy as np

from benchmarks import mutants
from benchmarks import rows
from benchmarks.markdown import markdown_table
from benchmarks.window_extension import tables as study

BACKENDS = {"jax": "JAX", "tensorflow": "TensorFlow", "torch": "PyTorch"}
PRESETS = ("digits_single_image", "digits_student", "digits_teacher")
SIZES = study.SIZES
TIMES = ("ms", "device_ms")  # Called from Python, and of the GPU alone.


def read(name, **wanted):
    """Rows of a benchmark whose columns have the values wanted, as text."""
    return [
        row
        for row in rows.read_rows(rows.RESULTS / f"{name}.csv")
        if all(row[key] == str(value) for key, value in wanted.items())
    ]


def only(name, **wanted):
    """The one row there is."""
    found = read(name, **wanted)
    if len(found) != 1:
        raise ValueError(
            f"`{name}.csv` must have one row of {wanted}. "
            f"Received: {len(found)} rows."
        )
    return found[0]


def ratio(column, row, other):
    return float(row[column]) / float(other[column])


def guide_runs():
    """The guide's accuracies and windows, on each seed it ran with."""
    lines = []
    for row in read("guide_runs", method="guide"):
        for name, label in (
            ("teacher", "teacher"),
            ("before", "student before"),
            ("after", "LAid"),
            ("logits", "logits alone"),
        ):
            window = row.get(f"window_{name}")
            window = f"{float(window):.1f}" if window else ""
            lines.append(line_of(label, row, name, [window]))
    return markdown_table(["", "seed", *SIZES, "effective window"], lines)


def single_image_summary():
    """What a student of single images learns from each method."""
    names = {
        "untouched": "untouched",
        "all_labels": "labels",
        "logits": "the teacher's logits",
        "last_layer": "logits, whole maps of the last layer",
        "hidden_states": "logits, hidden states of every layer",
        "wrong_heads": "logits, retrieval of heads drawn at random",
        "blind_heads": "logits, retrieval of heads that hardly see the needle",
        "retrieval": "LAid: logits, retrieval of the retrieval heads",
    }
    return methods_table("single_image", names, (1, 5, 10, 20))


def drawn_heads():
    """The needle attention of the teacher's heads that each run matched."""
    attention = collections.defaultdict(list)
    for row in read("retrieval_heads"):
        head = f"{row['layer']}.{row['head']}"
        attention[head].append(float(row["needle"]))
    found = []
    for method in ("retrieval", "wrong_heads", "blind_heads"):
        runs = read("window_extension", config="single_image", method=method)
        for row in runs:
            if row["accuracy_20"] and row["retrieval_heads"]:
                heads = row["retrieval_heads"].split()
                of_heads = [np.mean(attention[head]) for head in heads]
                found.append((of_heads, sorted(heads), row))
    lines = [
        [
            row["method"],
            row["seed"],
            ", ".join(heads),
            f"{np.mean(of_heads):.2f}",
            f"{max(of_heads):.2f}",
            *(f"{float(row[f'accuracy_{size}']):.3f}" for size in (5, 10, 20)),
        ]
        for of_heads, heads, row in sorted(
            found, key=lambda each: -max(each[0])
        )
    ]
    header = ["method", "seed", "layer.head", "mean", "largest", 5, 10, 20]
    return markdown_table(header, lines)


def compare_methods():
    """An earlier guide, and labels alone, on each seed."""
    names = {
        "guide": "the guide",
        "sft": "labels alone",
        "sft_stretched": "labels alone, stretched positions",
    }
    lines = []
    for seed, name in itertools.product("012", names):
        for row in read("compare_methods", method=name, seed=seed):
            if name == "guide":
                lines += [
                    line_of("teacher", row, "teacher", ["", ""]),
                    line_of(
                        "student before",
                        row,
                        "before",
                        [f"{float(row['window_before']):.1f}", ""],
                    ),
                ]
            windows = [row["window_after"], row["window_ratio"]]
            windows = [f"{float(value):.1f}" for value in windows]
            lines.append(line_of(names[name], row, "after", windows))
    header = ["", "seed", *SIZES, "effective window", "ratio"]
    return markdown_table(header, lines)


def line_of(label, row, when, windows):
    accuracy = [f"{float(row[f'{when}_{size}']):.3f}" for size in SIZES]
    return [label, row["seed"], *accuracy, *windows]


def methods_table(config, names, sizes):
    """Accuracy at some sizes and the window, of methods that have rows."""
    of_config = study.read_runs()[config]
    lines = []
    for name, label in names.items():
        if name not in of_config:
            continue
        runs = of_config[name]
        cells = [
            study.cell([run[size] for run in runs.values()]) for size in sizes
        ]
        window = study.ratio_of_windows(runs, of_config[study.UNTOUCHED])
        lines.append([label, len(runs), *cells, window])
    return markdown_table(["method", "seeds", *sizes, "window"], lines)


def attention_divergence_cpu():
    """Chunked against the definition, 4 heads of 64."""

    def row(backend, name, length):
        return only(
            "attention_divergence",
            backend=backend,
            implementation=name,
            length=length,
            head_dim=64,
        )

    lines = []
    for backend, label in BACKENDS.items():
        chunked = {n: row(backend, "chunked", n) for n in (2048, 4096, 8192)}
        plain = {n: row(backend, "definition", n) for n in (2048, 4096)}
        ratios = (
            ratio("ms", chunked[2048], plain[2048]),
            ratio("peak_mib", chunked[4096], plain[4096]),
            ratio("peak_mib", chunked[8192], chunked[2048]),
        )
        compiled = ", compiled" if backend == "tensorflow" else ""
        time, memory, growth = ratios
        lines.append(
            [label + compiled, f"{time:.2f}", f"{memory:.2f}", f"{growth:.1f}"]
        )
    header = [
        "",
        "time at 2,048",
        "memory at 4,096",
        "growth of memory, 2,048 to 8,192",
    ]
    return markdown_table(header, lines)


def gpu_rows(implementation, backend="torch"):
    """Rows of a GPU, each after what a table's line starts with."""
    for heads, head_dim in ((16, 128), (8, 256)):
        found = read(
            "attention_divergence",
            backend=backend,
            implementation=implementation,
            heads=heads,
            head_dim=head_dim,
            dtype="bfloat16",
        )
        label = f"{heads} heads of {head_dim}"
        for row in sorted(found, key=lambda row: int(row["length"])):
            yield [label, f"{int(row['length']):,}"], row
            label = ""


def beside(row, implementation):
    """Torch's row of the same shape."""
    names = ("length", "heads", "head_dim", "dtype")
    return only(
        "attention_divergence",
        backend="torch",
        implementation=implementation,
        **{name: row[name] for name in names},
    )


def attention_divergence_gpu():
    """The Triton kernels against torch's flash attention."""
    lines = []
    for start, row in gpu_rows("triton"):
        attention = beside(row, "dot_product_attention")
        cells = [milliseconds(each, "device_ms") for each in (row, attention)]
        over_attention = f"{ratio('device_ms', row, attention):.2f}"
        memory = f"{float(row['peak_mib']):.1f} MiB"
        lines.append([*start, *cells, over_attention, memory])
    header = ["", "length", "Triton", "attention", "ratio"]
    return markdown_table([*header, "memory beyond gradients"], lines)


def attention_divergence_pallas():
    """The Pallas kernels against those of Triton."""
    lines = []
    for start, row in gpu_rows("pallas", "jax"):
        triton = beside(row, "triton")
        cells = [milliseconds(each, "ms") for each in (row, triton)]
        ratios = (float(row["ms"]) / float(triton[n]) for n in TIMES)
        lines.append([*start, *cells, *(f"{each:.2f}" for each in ratios)])
    header = ["", "length", "Pallas", "Triton", "ratio"]
    return markdown_table([*header, "over Triton's time of the GPU"], lines)


def attention_output_gpu():
    """The kernels of what attention puts out, against flash attention."""
    pallas = {
        (row["heads"], row["length"]): milliseconds(row, "ms")
        for _, row in gpu_rows("attention_output/pallas", "jax")
    }
    lines = []
    for start, row in gpu_rows("attention_output/triton"):
        attention = beside(row, "dot_product_attention")
        cells = [milliseconds(each, "ms") for each in (attention, row)]
        key = row["heads"], row["length"]
        lines.append([*start, *cells, pallas.get(key, "")])
    header = ["", "length", "flash attention", "Triton", "Pallas"]
    return markdown_table(header, lines)


def preset_scores(name):
    """Accuracy of an embedded preset by haystack size."""
    row = only("preset_scores", preset=name)
    accuracy = [f"{float(row[f'accuracy_{size}']):.3f}" for size in SIZES]
    return markdown_table(["images", *SIZES], [["accuracy", *accuracy]])


def milliseconds(row, column):
    """Three digits or more."""
    value = float(row[column])
    return f"{value:.{3 if value < 1 else 2 if value < 10 else 1}f} ms"


def logits_divergence():
    """Chunked against the definition."""
    lines = []
    counted = {"1.0": "all tokens count", "0.0625": "one in 16"}
    for backend, share in itertools.product(("torch", "jax"), counted):
        chunked, plain = (
            only(
                "logits_divergence",
                backend=backend,
                counted=share,
                implementation=name,
            )
            for name in ("chunked", "definition")
        )
        memory = [f"{float(row['peak_mib']):,.0f}" for row in (chunked, plain)]
        lines.append(
            [
                f"{BACKENDS[backend]}, {counted[share]}",
                f"{ratio('ms', chunked, plain):.2f}",
                " against ".join(memory),
            ]
        )
    header = ["", "time, chunked over definition", "peak memory, MiB"]
    return markdown_table(header, lines)


def training_step():
    """A step of ours against others'."""
    lines = []
    for backend in BACKENDS:
        ours, keras_distiller, sft, teacher = (
            only("training_step", backend=backend, tokens=1024, method=method)
            for method in (
                "keras_laid",
                "keras_distiller",
                "sft",
                "teacher_forward",
            )
        )
        parts = float(sft["ms"]) + float(teacher["ms"])
        cells = (
            ratio("ms", ours, keras_distiller),
            float(ours["ms"]) / parts,
            ratio("peak_mib", ours, keras_distiller),
        )
        lines.append([BACKENDS[backend], *(f"{cell:.2f}" for cell in cells)])
    header = [
        "",
        "time, over Keras's distiller",
        "over fine-tuning and teacher",
        "memory, over Keras's distiller",
    ]
    return markdown_table(header, lines)


def retrieval_step():
    """What the retrieval term adds to a step, in rows of one run."""
    lines = []
    for backend in ("jax", "torch"):
        term = only("training_step", backend=backend, method="retrieval")
        without = only(
            "training_step",
            backend=backend,
            method="without_attention",
            commit=term["commit"],
        )
        cells = [f"{ratio(c, term, without):.3f}" for c in ("ms", "peak_mib")]
        lines.append([BACKENDS[backend], *cells])
    header = ["", "time with the retrieval term, over without", "memory"]
    return markdown_table(header, lines)


def linear_memory():
    """Time and memory of a step by its switches."""
    labels = {
        ("False", "False"): "as KerasHub computes it",
        ("True", "False"): "`linear_memory`",
        ("True", "True"): "`linear_memory`, `rematerialize`",
    }
    lines = []
    for (linear, rematerialize), label in labels.items():
        cells = [label]
        for backend in ("jax", "torch"):
            of_backend = {"backend": backend, "tokens": 4096}
            row = only(
                "training_step",
                linear_memory=linear,
                rematerialize=rematerialize,
                **of_backend,
            )
            plain = only("training_step", linear_memory=False, **of_backend)
            cells += [
                "1" if row == plain else f"{ratio('ms', row, plain):.2f}",
                f"{float(row['peak_mib']):,.0f}",
            ]
        lines.append(cells)
    header = ["", "JAX: time", "memory, MiB", "PyTorch: time", "memory, MiB"]
    return markdown_table(header, lines)


def memory_plan():
    """What each part of a plan takes."""
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
    for row in read("memory_plan"):
        mesh = row["mesh_shape"].strip("()").replace(", ", " x ")
        gigabytes = [f"{float(row[name]) / 1e9:.1f}" for name in columns]
        lines.append([f"{row['pair']}, {row['devices']}", mesh, *gigabytes])
    return markdown_table(["", "mesh", *columns.values()], lines)


def mutation_testing():
    """How many of each sample's mutants the tests notice."""
    lines = []
    samples = {(row["package"], row["seed"]) for row, *_ in mutants.read()}
    for package, seed in sorted(samples):
        found = mutants.read(package=package, seed=seed)
        killed = sum(map(mutants.is_killed, found))
        of = found[-1][0]["mutants"]
        lines.append(
            [
                f"`{package}`",
                seed,
                f"{int(of):,}",
                len(found),
                killed,
                f"{killed / len(found):.0%}",
            ]
        )
    header = ["", "seed", "mutants", "tried", "killed", "share"]
    return markdown_table(header, lines)


def mutation_survivors():
    """The mutants that no test notices, and why."""
    lines = [
        f"- `{row['module']}`: `{row['before']}` becomes `{row['after']}`: "
        f"{mutants.reason([row, *others])}."
        for row, *others in mutants.read()
        if not mutants.is_killed([row, *others])
    ]
    return "\n".join(sorted(lines))


TABLES = (
    guide_runs,
    single_image_summary,
    drawn_heads,
    compare_methods,
    attention_divergence_cpu,
    attention_divergence_gpu,
    attention_divergence_pallas,
    attention_output_gpu,
    logits_divergence,
    training_step,
    retrieval_step,
    linear_memory,
    memory_plan,
    mutation_testing,
    mutation_survivors,
)


def make_tables():
    """Every table, by the name of its marks."""
    tables = {make.__name__: make() for make in TABLES}
    tables |= {name: preset_scores(name) for name in PRESETS}
    return tables | study.make_tables()
