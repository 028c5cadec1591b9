// Both pages on a server that asks for keys. Runs last, as its name has it: from the first key on, the server asks
// everybody.

import assert from 'node:assert/strict';
import path from 'node:path';
import { after, before, test } from 'node:test';
import { assertAccessible, assertClean, createKey, open, out, until, url } from './browser.js';

let browser, page, both, inference;

before(async () => {
  inference = createKey('inference');
  both = createKey('inference', 'metrics');
  await until(async () => (await fetch(`${url}/v1/models`)).status === 401, 'keys are asked for');
  browser = await open({ width: 1280, height: 800 });
  ({ page } = browser);
  await page.goto(`${url}/`);
});
after(() => browser?.close());

const field = () => page.getByRole('textbox', { name: 'API key' });
const enter = async (key) => {
  await field().fill(key);
  await field().press('Tab');
};

test('without a key the page says that it needs one', async () => {
  await page.locator('#model', { hasText: 'asks for an API key' }).waitFor();
  assert.match(await page.locator('#key-error').innerText(), /m40llm keys create/);
  assert.match(await page.locator('#metrics-note').innerText(), /scope “metrics”/);
});

test('a wrong key is told, and not tried over and over', async () => {
  await enter('sk-m40-wrong');
  await page.locator('#key-error', { hasText: 'The API key is not valid.' }).waitFor();
  assert.equal(await field().getAttribute('aria-invalid'), 'true');
  await page.getByLabel('Message', { exact: true }).fill('Hello.');
  await page.getByRole('button', { name: 'Send' }).click();
  await page.locator('.turn.model .error', { hasText: 'The API key is not valid.' }).waitFor();
  await assertAccessible(page, 'with a wrong key');
  await page.screenshot({ path: path.join(out, 'page-wrong-key.png') });
  const asked = browser.requested.length;
  await page.waitForTimeout(5000);
  assert.equal(browser.requested.length, asked, 'no further failed authentications');
  await enter('sk-m40-ключ');
  await page.locator('#key-error', { hasText: 'characters that no key has' }).waitFor();
});

test('a key for inference may chat, and not see the figures', async () => {
  await enter(` ${inference} `);
  await page.locator('#model b').waitFor();
  assert.equal(await page.locator('#key-error').innerText(), '');
  assert.equal(await field().getAttribute('aria-invalid'), 'false');
  await page.locator('#metrics-note', { hasText: '--scope metrics' }).waitFor();
  assert.equal(await page.locator('#charts').isVisible(), false);
  await page.getByLabel('Max tokens').fill('8');
  await page.getByLabel('Message', { exact: true }).fill('Hello.');
  await page.getByLabel('Message', { exact: true }).press('Enter');
  await page.locator('.turn.model .meta', { hasText: 'tokens/s' }).waitFor();
});

test('a key with both scopes sees them', async () => {
  await enter(both);
  await page.locator('#chart-requests b', { hasText: '·' }).waitFor();
  assert.equal(await page.locator('#metrics-note').isVisible(), false);
});

test('the key stays in its tab', async () => {
  await page.reload();
  await page.locator('#model b').waitFor();
  assert.equal(await field().inputValue(), both);
  assert.equal(await field().getAttribute('type'), 'password');
  const kept = await page.evaluate(() => [{ ...sessionStorage }, { ...localStorage }, document.cookie]);
  assert.deepEqual(kept, [{ 'api-key': both }, {}, '']);
  const other = await page.context().newPage();
  await other.goto(`${url}/`);
  await other.locator('#model', { hasText: 'asks for an API key' }).waitFor();
  assert.equal(await other.getByRole('textbox', { name: 'API key' }).inputValue(), '');
  await other.close();
  assert.deepEqual(browser.requested.filter((address) => address.includes('sk-m40')), [], 'no key in an address');
});

test('Swagger UI: refused without a key, served once it is authorised', async () => {
  await page.goto(`${url}/docs`);
  const block = page.locator('.opblock').filter({ has: page.locator('.opblock-summary-path[data-path="/v1/models"]') });
  await block.locator('.opblock-summary-control').first().click();
  const status = block.locator('.live-responses-table tbody .response-col_status').first();
  const execute = block.getByRole('button', { name: 'Execute' });
  await execute.click();
  await status.filter({ hasText: '401' }).waitFor();
  await page.getByRole('button', { name: 'Authorize' }).first().click();
  const dialog = page.locator('.dialog-ux .modal-ux');
  await dialog.locator('input').first().fill(both);
  await dialog.locator('button.authorize').first().click();
  await dialog.locator('button.btn-done').click();
  await execute.click();
  await status.filter({ hasText: '200' }).waitFor();
});

test('nothing was asked of another host, nothing failed but for the keys', () => {
  assertClean(browser, /^40[13] |status of 40[13]/);
});
