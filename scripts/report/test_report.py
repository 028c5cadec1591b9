"""python3 scripts/report/test_report.py: bounds, cliffs, the tables and the chart, on figures made up for it."""

import sys
import unittest
import xml.etree.ElementTree
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from report import chart, figures, tables  # noqa: E402


def run(model: str, quant: str, results: list[dict]) -> dict:
    report = {"device": "cuda (a card)", "model": model, "quant": quant, "copy_gb_per_s": 2700.0, "results": results}
    return {"command": f"m40llm bench --shape {model}", "report": {**report, "products_tflops": {"gemm_f16": 47.0}}}


def decode(batch: int, speed: float, depth: int = 0, host: float = 0.02) -> dict:
    return {"test": "decode", "n_tokens": 24, "batch": batch, "depth": depth, "tokens_per_s": speed, "gb_per_s": 1.0,
            "share_of_copy": 0.5, "host_share": host}  # fmt: skip


def found(*runs: dict) -> tuple[figures.Speeds, dict[str, figures.Goal]]:
    speeds = figures.Speeds(list(runs))
    return speeds, {goal.name: goal for goal in figures.judged(speeds)}


# A step of 1 to 32 sequences takes 10 ms, from the 17th on 14.
SWEEP = [decode(b, b / (0.014 if b >= 17 else 0.010)) for b in range(1, 33)]


class Report(unittest.TestCase):
    def test_a_cliff_is_found_where_it_is(self):
        speeds, goals = found(run("llama3-8b", "Q8_0", SWEEP))
        ratio, batch = speeds.steepest("llama3-8b", "Q8_0")
        self.assertAlmostEqual(ratio, 1.4)
        self.assertEqual(batch, 17)
        steps = next(goal for name, goal in goals.items() if "Q8_0, 1 to 32" in name)
        self.assertFalse(steps.kept())
        self.assertIn("wanted at most 1.30", tables.missed(steps))

    def test_what_was_not_measured_is_missed(self):
        _, goals = found(run("llama3-8b", "Q8_0", SWEEP[:31]))
        for name in ("llama3-8b Q8_0, 1 to 32: a step over that of one less, at most", "llama3-8b Q8_0, batch 32"):
            self.assertFalse(goals[name].kept())
            self.assertIn("not measured", tables.missed(goals[name]))

    def test_depth_and_host_time_are_held_from_above(self):
        deep = run("llama3-8b", "Q4_K_M", [decode(1, 100.0), decode(1, 86.0, figures.DEEP), decode(16, 900.0, host=0.06)])
        _, goals = found(deep)
        lost, host = (next(goal for name, goal in goals.items() if part in name) for part in ("depth", "host"))
        self.assertAlmostEqual(lost.measured, 0.14)
        self.assertTrue(lost.kept())
        self.assertFalse(host.kept())

    def test_a_later_run_goes_before_an_earlier_one(self):
        speeds, _ = found(run("llama3-8b", "F16", [decode(1, 100.0)]), run("llama3-8b", "F16", [decode(1, 120.0)]))
        self.assertEqual(speeds.by_batch("llama3-8b", "F16"), {1: 120.0})

    def test_the_tables_hold_the_figures_and_the_model(self):
        runs = [run("llama3-8b", "Q8_0", SWEEP)]
        speeds, goals = found(*runs)
        facts = {"machine": {"date": "2026-01-01", "version": "m40llm 1", "driver": "580"}, "runs": runs}
        text = tables.markdown(facts, speeds, list(goals.values()), {("llama3-8b", "Q8_0", 16): 321.4})
        self.assertIn("| llama3-8b Q8_0, batch 16 | ≥ 1100 | ≥ 1700 | 1600 | 308.0 | 321.4 |", text)
        self.assertIn("gemm_f16 47.0 TFLOP/s", text)

    def test_a_page_keeps_what_is_outside_of_its_marks(self):
        page = "before\n<!-- measured: begin -->\nold\n<!-- measured: end -->\nafter\n"
        once = tables.replaced(page, "measured", "new\n")
        self.assertEqual(once, "before\n<!-- measured: begin -->\n\nnew\n\n<!-- measured: end -->\nafter\n")
        self.assertEqual(tables.replaced(once, "measured", "new\n"), once)
        with self.assertRaises(SystemExit):
            tables.replaced("no marks", "measured", "new")

    def test_the_chart_is_an_image(self):
        speeds, _ = found(run("llama3-8b", "Q8_0", SWEEP))
        xml.etree.ElementTree.fromstring(chart.draw(speeds, "a card & a date"))


if __name__ == "__main__":
    unittest.main()
