"""scripts/bench-serving.py at its smallest: every measurement ends, and what does not depend on time is right."""

import json
import subprocess
import sys
import xml.etree.ElementTree
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[3] / "scripts" / "bench-serving.py"


def test_the_serving_benchmark_measures_all_of_it(server, tmp_path):
    figures, chart = tmp_path / "figures.json", tmp_path / "chart.svg"
    command = [sys.executable, SCRIPT, "--quick", "--check", "--binary", server.binary, "--json", figures, "--chart", chart]
    done = subprocess.run([*command, server.model], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(figures.read_text())
    assert found["throughput"]["different_texts"] == 0
    assert found["memory"]["blocks"] < found["memory"]["wanted_blocks"]
    assert (found["memory"]["failed"], found["memory"]["different_texts"]) == (0, 0)
    assert found["memory"]["preemptions"] > 0
    assert found["prefix"]["cached"] == 96
    assert found["long"]["ttft_beside_s"] > 0 and found["fairness"]["ttft_s"] > 0
    assert found["soak"]["ratio"] > 0
    assert all(rate["goodput_per_s"] > 0 for rate in found["open_loop"])
    assert xml.etree.ElementTree.parse(chart).getroot().tag.endswith("svg")
