"""Checks the report of `make demo`.

Exits with code 1 and one line for every requirement that does not hold. Goals are only printed: whether a run reaches
them depends on the machine and on the Python library, which change the outcome of training (dev/LOG.md).
"""

import json
import sys


def requirements(report: dict) -> dict[str, bool]:
    """Conditions that must hold in every run."""
    rows = {(row["model"], row["decoder"]): row for row in report["rows"]}
    accepted = {key: row["mean_accepted_tokens"] for key, row in rows.items()}
    decoders = {decoder for _, decoder in rows}
    small = [model for model, _ in rows if model in ("sft", "msn")]
    real = [model for model, _ in rows if model.startswith("smollm2")]
    return {
        "2 small models with 5 decoders each": len(decoders) == 5 and len(small) == 10,
        "the real one with 5 decoders, and with 2 and its adapter, unless it was not to be had": len(real) in (0, 7),
        "no row twice": len(report["rows"]) == len(rows),
        "every completion is exact": all(row["exact_share"] == 1.0 for row in rows.values()),
        "jacobi on msn: more mean accepted tokens than on sft": accepted["msn", "jacobi"] > accepted["sft", "jacobi"],
        "tr_jacobi on msn: at least jacobi": accepted["msn", "tr_jacobi"] >= accepted["msn", "jacobi"],
        "tr_jacobi on msn: at least prompt_lookup": accepted["msn", "tr_jacobi"] >= accepted["msn", "prompt_lookup"],
        "at most 10 minutes": report["seconds"] <= 600,
    }


def goals(report: dict) -> dict[str, bool]:
    """Conditions that the demo aims for."""
    rows = {(row["model"], row["decoder"]): row for row in report["rows"]}
    msn, sft = (rows[model, "jacobi"]["mean_accepted_tokens"] for model in ("msn", "sft"))
    losses = {name: values["clean_loss"] for name, values in report["models"].items()}
    real = rows.get(("smollm2", "auto"))
    return {
        "auto on smollm2: at least 0.98x as fast as autoregressive": real is not None and real["speedup"] >= 0.98,
        "jacobi on msn: at least 1.5 mean accepted tokens": msn >= 1.5,
        "jacobi on msn: at least 1.35x jacobi on sft": msn >= 1.35 * sft,
        "tr_jacobi on msn: at least 1.3x as fast as autoregressive": rows["msn", "tr_jacobi"]["speedup"] >= 1.3,
        "clean loss of msn: at most 3% above sft": losses["msn"] <= 1.03 * losses["sft"],
    }


def main(path: str) -> int:
    """Prints goals and violated requirements. Returns the exit code."""
    with open(path, encoding="utf-8") as file:
        report = json.load(file)
    for goal, reached in goals(report).items():
        print(f"goal {'reached' if reached else 'not reached'}: {goal}")
    violated = [requirement for requirement, satisfied in requirements(report).items() if not satisfied]
    for requirement in violated:
        print(f"{path}: requirement does not hold: {requirement}", file=sys.stderr)
    return int(bool(violated))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
