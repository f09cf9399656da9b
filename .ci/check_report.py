"""Holds the report of `make demo` against what the project promises. Exit code 1, and a line per broken promise."""

import json
import sys


def broken_promises(report: dict) -> list[str]:
    """What the report falls short of."""
    rows = {(row["model"], row["decoder"]): row for row in report["rows"]}
    accepted = {key: row["mean_accepted_tokens"] for key, row in rows.items()}
    models = report["models"]
    promises = {
        "8 rows: 2 models, 4 decoders": len(rows) == 8,
        "every answer is exact": all(row["exact_share"] == 1.0 for row in rows.values()),
        "jacobi on msn: at least 1.5 tokens a pass": accepted["msn", "jacobi"] >= 1.5,
        "jacobi on msn: at least 1.35x jacobi on sft": accepted["msn", "jacobi"] >= 1.35 * accepted["sft", "jacobi"],
        "tr_jacobi on msn: at least jacobi": accepted["msn", "tr_jacobi"] >= accepted["msn", "jacobi"],
        "tr_jacobi on msn: at least prompt_lookup": accepted["msn", "tr_jacobi"] >= accepted["msn", "prompt_lookup"],
        "tr_jacobi on msn: at least 1.3x as fast as autoregressive": rows["msn", "tr_jacobi"]["speedup"] >= 1.3,
        "clean loss of msn: at most 3% above sft": models["msn"]["clean_loss"] <= 1.03 * models["sft"]["clean_loss"],
        "at most 12 minutes": report["seconds"] <= 720,
    }
    return [promise for promise, kept in promises.items() if not kept]


if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        broken = broken_promises(json.load(file))
    for promise in broken:
        print(f"{sys.argv[1]}: does not hold: {promise}", file=sys.stderr)
    print("report: " + ("ok" if not broken else f"{len(broken)} promises broken"))
    sys.exit(bool(broken))
