import json

import numpy as np
import tiny_config

from msn_jax import metrics


def steps_in(workdir):
    return [json.loads(line)["step"] for line in (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_resumed_run_repeats_no_step(tmp_path, capsys):
    with metrics.Writer(tmp_path, 0, 4) as writer:
        for step in (1, 2, 3):
            writer.write(step, {"loss": np.float32(0.5), "noise_loss": np.array([1.0, np.nan], np.float32)})
    with (tmp_path / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 4, "lo')  # as after a crash
    with metrics.Writer(tmp_path, 2, 4) as writer:
        assert steps_in(tmp_path) == [1, 2]
        writer.write(3, {"loss": np.float32(0.25)})
    assert steps_in(tmp_path) == [1, 2, 3]
    first = json.loads((tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert first == {"step": 1, "loss": 0.5, "noise_loss": [1.0, None]}  # valid JSON: no NaN
    assert metrics.final_metrics(tmp_path) == {"step": 3, "loss": 0.25}
    assert list((tmp_path / "tensorboard").glob("events*"))
    assert capsys.readouterr().out.splitlines()[0] == "step 1: loss 0.500"  # stdout is not a terminal


def test_flops_count_six_per_parameter_plus_attention():
    cfg = tiny_config.get_config().model
    attention = 16 * 8 * (2 + 1 + 1) + 16 * 16  # q, k, v, o
    parameters = 2 * (attention + 3 * 16 * 32) + 320 * 16
    assert metrics.flops_per_token(cfg, 32) == 6 * parameters + 12 * 2 * 2 * 8 * 32


def test_peak_flops_are_those_of_known_devices_only():
    assert metrics.peak_flops("cpu") is None
    assert metrics.peak_flops("TPU v5 lite") == 197e12
    assert metrics.peak_flops("TPU v5p") == metrics.peak_flops("TPU v5") == 459e12
    assert metrics.peak_flops("NVIDIA H100 80GB HBM3") == 989e12


def test_the_meter_counts_steps_since_the_last_read():
    meter = metrics.Meter(tiny_config.get_config().model, 100, 32, start=10)
    assert meter.read(10) == {}
    assert meter.read(12)["tokens_per_second"] > 0
    assert meter.read(12) == {}
