// Swagger UI at /docs, worked as a person would.

import assert from 'node:assert/strict';
import path from 'node:path';
import { after, before, test } from 'node:test';
import { assertClean, open, out, url } from './browser.js';

let browser, page, document;

before(async () => {
  document = await (await fetch(`${url}/openapi.json`)).json();
  browser = await open({ width: 1280, height: 1600 });
  ({ page } = browser);
});
after(() => browser?.close());

const operation = (method, route) =>
  page.locator('.opblock').filter({
    has: page.locator(`.opblock-summary-path[data-path="${route}"]`),
  }).filter({ has: page.locator('.opblock-summary-method', { hasText: new RegExp(`^${method}$`, 'i') }) });

/** Opens an operation, executes it (with `body`, when given), and returns its status and text. */
async function execute(method, route, body) {
  const block = operation(method, route);
  await block.locator('.opblock-summary-control').first().click();
  const tryIt = block.locator('.try-out__btn');
  await tryIt.waitFor();
  if ((await tryIt.innerText()).trim() === 'Try it out') await tryIt.click();
  if (body !== undefined) await block.locator('textarea.body-param__text').fill(JSON.stringify(body));
  await block.getByRole('button', { name: 'Execute' }).click();
  const live = block.locator('.live-responses-table');
  await live.waitFor();
  const status = (await live.locator('tbody .response-col_status').first().innerText()).trim();
  const text = await live.locator('tbody .response-col_description pre').first().innerText();
  return { block, status, text };
}

test('the page lists every operation of the document', async () => {
  await page.goto(`${url}/docs`);
  await page.locator('.opblock').first().waitFor();
  assert.equal((await page.locator('.info .title').innerText()).split('\n')[0].trim().startsWith('m40llm'), true);
  for (const [route, item] of Object.entries(document.paths)) {
    for (const method of Object.keys(item)) {
      assert.equal(await operation(method, route).count(), 1, `${method} ${route}`);
    }
  }
  await page.screenshot({ path: path.join(out, 'docs.png'), fullPage: true });
});

test('Authorize takes a key and requests carry it', async () => {
  await page.getByRole('button', { name: 'Authorize' }).first().click();
  const dialog = page.locator('.dialog-ux .modal-ux');
  await dialog.waitFor();
  await dialog.locator('input').first().fill('sk-m40-example');
  await page.screenshot({ path: path.join(out, 'authorize.png') });
  await dialog.locator('button.authorize').first().click();
  await dialog.locator('button', { hasText: 'Logout' }).waitFor();
  await dialog.locator('button.btn-done').click();
  const sent = page.waitForRequest((request) => request.url().endsWith('/v1/models'));
  const { status, text } = await execute('get', '/v1/models');
  assert.equal((await sent).headers().authorization, 'Bearer sk-m40-example');
  assert.equal(status.split(/\s/)[0], '200');
  assert.match(text, /"object": "list"/);
});

test('a chat completion is executed', async () => {
  const body = { messages: [{ role: 'user', content: 'Say hello.' }], max_tokens: 16, temperature: 0 };
  const { block, status, text } = await execute('post', '/v1/chat/completions', body);
  assert.equal(status.split(/\s/)[0], '200');
  const answer = JSON.parse(text);
  assert.ok(answer.choices[0].message.content.length > 0);
  await block.screenshot({ path: path.join(out, 'chat.png') });
});

test('nothing was asked of another host, nothing failed', () => {
  assert.ok(browser.requested.length > 3);
  assertClean(browser);
});
