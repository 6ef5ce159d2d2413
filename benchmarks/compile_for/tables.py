"""The table of compiled steps, from the rows."""

from benchmarks import rows
from benchmarks.markdown import markdown_table


def compiled_step():
    """Memory of one chip as XLA counts it, beside that of `keras_laid.plan`."""
    lines = []
    for row in rows.read("compiled_step"):
        plan = float(row["plan_bytes"])
        cells = [row["pair"], row["chip"], f"{int(row['tokens']):,}"]
        if row["fits"] == "True":
            arguments, temporary = (
                float(row[name])
                for name in ("argument_bytes", "temporary_bytes")
            )
            total = arguments + temporary
            cells += [
                *(f"{x / 1e9:.2f}" for x in (arguments, temporary, total)),
                f"{plan / 1e9:.2f}",
                f"{plan / total:.2f}",
                f"{float(row['compile_seconds']):.0f}",
            ]
        else:
            cells += ["", "", "does not fit", f"{plan / 1e9:.2f}", "", ""]
        lines.append(cells)
    header = [
        "pair",
        "chip",
        "tokens",
        "state and batch, GB",
        "temporary, GB",
        "total, GB",
        "plan, GB",
        "plan over total",
        "compiled in, s",
    ]
    return markdown_table(header, lines)


TABLES = {"compiled_step": compiled_step}
