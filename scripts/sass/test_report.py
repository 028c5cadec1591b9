"""python3 scripts/sass/test_report.py: the parser on an excerpt of two kernels' listings, the budgets, the model."""

import sys
import unittest
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import sass_report  # noqa: E402
from sass import listing, model  # noqa: E402

KERNELS = listing.parse((HERE / "sample.sass").read_text().splitlines())


class Listing(unittest.TestCase):
    def test_kernels_are_told_apart(self):
        self.assertEqual(list(KERNELS), ["rmsnorm", "gemv_f16"])
        self.assertEqual([k.registers for k in KERNELS.values()], [32, 72])
        self.assertEqual([k.local_accesses() for k in KERNELS.values()], [0, 2])
        self.assertEqual(KERNELS["rmsnorm"].instructions()[-1].name, "NOP")

    def test_the_main_loop_is_the_innermost_with_the_most_arithmetic(self):
        self.assertEqual(len(KERNELS["rmsnorm"].innermost_loops()), 1)
        body = KERNELS["rmsnorm"].main_loop()
        self.assertEqual((body[0].name, body[-1].name, body[-1].target), ("LOP32I", "BRA", ".L_x_6"))
        # The loop around it, from .L_x_521, is not counted.
        self.assertEqual(KERNELS["gemv_f16"].main_loop()[0].name, "LDL")

    def test_of_two_copies_of_a_loop_the_shorter_one_counts(self):
        def loop(label, *body):
            return [label, *map(listing.parse_instruction, body), listing.parse_instruction(f"BRA `({label})")]

        rest = loop(".L_x_1", "XMAD R1, R2, R3, R4", "LDG R0, [R1]", "IADD R1, R1, R9", "FFMA R5, R0, R6, R5")
        whole = loop(".L_x_2", "LDG R0, [R1]", "FFMA R5, R0, R6, R5")
        other = loop(".L_x_3", "FFMA R5, R0, R6, R5")
        body = listing.Kernel("twice", code=[*rest, *whole, *other]).main_loop()
        self.assertEqual([i.name for i in body], ["LDG", "FFMA", "BRA"])

    def test_a_pass_costs_its_instructions_and_the_busiest_pipe(self):
        cost = listing.Cost.of(KERNELS["rmsnorm"].main_loop())
        # DEPBAR is free; BFE, SHR, LEA and ISETP have half the rate.
        self.assertEqual((cost.slots, cost.half_rate, cost.quarter_rate, cost.ffma), (13, 4, 0, 2))
        self.assertEqual(cost.busiest(), 13)
        cost = listing.Cost.of(KERNELS["gemv_f16"].main_loop())
        self.assertEqual((cost.slots, cost.quarter_rate, cost.ffma), (12, 3, 5))
        # 12 issued, and 4 cycles lost to conflicts; three conversions would be 12.
        self.assertEqual(cost.busiest(), 16)

    def test_sources_of_one_bank_conflict_unless_reused_or_the_same(self):
        def lost(*lines):
            return listing.bank_conflicts([listing.parse_instruction(line) for line in lines])

        self.assertEqual(lost("FFMA R0, R4, R5, R6"), 0)
        self.assertEqual(lost("FFMA R0, R4, R8, R6"), 1)
        self.assertEqual(lost("FFMA R0, R4, R8, -R12"), 2)
        self.assertEqual(lost("FFMA R0, R4, R4, R4"), 0)
        self.assertEqual(lost("FFMA R0, R4, c[0x2][0x4], R8"), 1)
        self.assertEqual(lost("FFMA R0, R4.reuse, R5, R6", "FFMA R1, R4, R8, R7"), 0)
        self.assertEqual(lost("FFMA R0, R4.reuse, R5, R6", "FFMA R1, R8, R4, R7"), 1)
        # R45 and R69 are of bank 1 as R25 is, which the second FFMA finds in the operand cache; R6, R30 and R10 of bank 2.
        self.assertEqual(listing.Cost.of(KERNELS["gemv_f16"].main_loop()).conflicts, 4)


class Report(unittest.TestCase):
    def lines(self, toml, kernel="gemv_f16"):
        budgets = sass_report.Budgets(toml)
        budget, _ = budgets.of(kernel)
        _, measured = sass_report.figures(KERNELS[kernel], budget)
        return list(sass_report.violations(kernel, budget, measured))

    def test_a_figure_over_its_budget_is_named_with_it(self):
        self.assertEqual(self.lines("[default]\nlocal = 2\nregisters = 72"), [])
        self.assertEqual(
            self.lines("[default]\nlocal = 0\nregisters = 71"),
            ["gemv_f16: registers 72, budget <= 71", "gemv_f16: local memory accesses 2, budget <= 0"],
        )
        toml = "[default]\n[[kernel]]\nname = 'gemv_.*'\nweights = 4\nslots = 2.9\nffma = 0.5\nconflicts = 0.1"
        self.assertEqual(
            self.lines(toml),
            [
                "gemv_f16: bank conflicts per FFMA 80.0%, budget <= 10.0%",
                "gemv_f16: slots a weight 3.00, budget <= 2.90",
                "gemv_f16: FFMA in all cycles 31.2%, budget >= 50.0%",
            ],
        )
        self.assertIn("needs `weights`", self.lines("[default]\nslots = 3")[0])

    def test_the_last_entry_that_matches_the_whole_name_wins(self):
        toml = "[default]\nlocal = 0\n[[kernel]]\nname = 'gemv_.*'\nlocal = 1\n[[kernel]]\nname = 'gemv_f16'\nlocal = 2"
        self.assertEqual(self.lines(toml), [])
        self.assertEqual(self.lines("[default]\n[[kernel]]\nname = 'gemv'\nlocal = 0"), [])

    def test_a_budget_of_no_kernel_and_an_unknown_key_are_errors(self):
        budgets = sass_report.Budgets("[default]\n[[kernel]]\nname = 'gemv_f1'\n[[kernel]]\nname = 'rms.*'")
        self.assertEqual(budgets.unused(KERNELS), ["gemv_f1"])
        with self.assertRaises(SystemExit):
            sass_report.Budgets("[default]\nregister = 3")


class Model(unittest.TestCase):
    def test_a_step_takes_the_longer_of_reading_and_issuing(self):
        weights = sum(model.weights("llama3-8b"))
        self.assertAlmostEqual(weights / 1e9, 7.50, places=2)
        read = weights * 2 / 245e9
        self.assertAlmostEqual(model.seconds([("f16", weights)], {"f16": 3}), read)
        self.assertAlmostEqual(model.seconds([("f16", weights)], {"f16": 60}), weights * 60 / 3.42e12, places=3)

    def test_the_table_leaves_unknown_cells_empty(self):
        table = model.table("llama3-8b", {1: {"f16": 3.0}, 8: {"f16": 12.0, "q4_k": 13.5, "q6_k": 14.0}}, {"f16": 0.8})
        rows = {line.split(" | ")[0].strip("| "): line for line in table.splitlines()}
        self.assertEqual(rows["F16"], "| F16 | 16.3 | 16.3 | 130.6 | 365 |")
        self.assertTrue(rows["Q4_K_M"].startswith("| Q4_K_M | 5"))
        self.assertIn("|  |  |  |", rows["Q5_0"])


if __name__ == "__main__":
    unittest.main()
