// What the tests of pages share: Chromium with an empty profile, and a record of what went wrong in it.
// run.sh sets TEST_URL, TEST_OUT, TEST_CHROMIUM, TEST_BINARY and TEST_STATE.

import assert from 'node:assert/strict';
import { execFileSync } from 'node:child_process';
import { mkdtemp, rm } from 'node:fs/promises';
import os from 'node:os';
import path from 'node:path';
import axe from 'axe-core';
import { chromium } from 'playwright-core';

export const { TEST_URL: url, TEST_OUT: out } = process.env;
const { TEST_CHROMIUM: executablePath, TEST_BINARY: binary, TEST_STATE: state } = process.env;
const flags = [
  '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking',
  '--disable-component-update', '--disable-sync',
];

/**
 * A browser with one page. `requested` has what was asked for, `problems` what failed: exceptions, errors on the
 * console, such as what a policy forbids, and answers from 400 on.
 */
export async function open(viewport) {
  // A new, empty profile: nothing remembered, nothing to synchronise.
  const profile = await mkdtemp(path.join(os.tmpdir(), 'm40llm-ui-'));
  const context = await chromium.launchPersistentContext(profile, { executablePath, headless: true, args: flags, viewport });
  const page = context.pages()[0] ?? (await context.newPage());
  page.setDefaultTimeout(120_000);
  const [requested, problems] = [[], []];
  page.on('request', (request) => requested.push(request.url()));
  page.on('pageerror', (error) => problems.push(String(error)));
  page.on('console', (message) => message.type() === 'error' && problems.push(message.text()));
  page.on('response', (response) => response.status() >= 400 && problems.push(`${response.status()} ${response.url()}`));
  const close = async () => {
    await context.close();
    await rm(profile, { recursive: true, force: true });
  };
  return { page, requested, problems, close };
}

/** Nothing was asked of another host, and nothing failed but what `expected` matches. */
export function assertClean({ requested, problems }, expected = /^$/) {
  assert.deepEqual(requested.filter((address) => !address.startsWith(`${url}/`) && !/^(data|blob):/.test(address)), []);
  assert.deepEqual(problems.filter((problem) => !expected.test(problem)), []);
}

/** axe-core finds nothing serious. It runs beside the page's policy, as a browser's developer tools do. */
export async function assertAccessible(page, where) {
  await page.evaluate(axe.source);
  const { violations, passes } = await page.evaluate(() => globalThis.axe.run());
  const serious = violations.filter(({ impact }) => impact === 'serious' || impact === 'critical');
  const told = serious.map(({ id, help, nodes }) => `${id}: ${help}: ${nodes.map((node) => node.html).join(' ')}`);
  assert.deepEqual(told, [], where);
  assert.ok(passes.some(({ id }) => id === 'color-contrast'), `${where}: contrast was looked at`);
}

/** A new key of the server's, with these scopes. From the first one on it asks for keys. */
export function createKey(...scopes) {
  const asked = scopes.flatMap((scope) => ['--scope', scope]);
  const env = { ...process.env, XDG_STATE_HOME: state };
  return execFileSync(binary, ['keys', 'create', '--name', 'ui', ...asked], { env, encoding: 'utf8', stdio: 'pipe' }).trim();
}

/** A sample of the server's metrics. */
export async function metric(name, key) {
  const headers = key ? { authorization: `Bearer ${key}` } : {};
  const text = await (await fetch(`${url}/metrics`, { headers })).text();
  const line = text.split('\n').find((candidate) => candidate.startsWith(`${name} `));
  assert.ok(line, `${name} in\n${text}`);
  return Number(line.slice(name.length + 1));
}

/** Waits until `holds()` is true. */
export async function until(holds, what) {
  for (let i = 0; i < 300; i++) {
    if (await holds()) return;
    await new Promise((resolve) => setTimeout(resolve, 100));
  }
  assert.fail(`after 30 s still not: ${what}`);
}
