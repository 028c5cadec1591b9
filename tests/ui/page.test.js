// The page at /, worked as a person would, on a server that asks for no key.

import assert from 'node:assert/strict';
import path from 'node:path';
import { after, before, beforeEach, test } from 'node:test';
import { assertAccessible, assertClean, metric, open, out, until, url } from './browser.js';

let browser, page;
const WIDE = { width: 1280, height: 800 };
const NARROW = { width: 390, height: 780 };
const LONG = 'Tell me a long story about a lighthouse and the people who lived there.';

before(async () => {
  browser = await open(WIDE);
  ({ page } = browser);
});
after(() => browser?.close());
beforeEach(async () => {
  await page.unrouteAll();
  await page.emulateMedia({ colorScheme: 'light' });
  await page.setViewportSize(WIDE);
  await page.goto(`${url}/`);
  await page.locator('#model b').waitFor();
});

const message = () => page.getByLabel('Message', { exact: true });
const answers = () => page.locator('.turn.model');
const picture = (name) => page.screenshot({ path: path.join(out, `page-${name}.png`) });

async function say(text) {
  await message().fill(text);
  await message().press('Enter');
}

/** The last answer, once it is whole. */
async function answered() {
  await page.locator('#send').waitFor();
  return {
    text: await answers().last().locator('> .text').innerText(),
    meta: await answers().last().locator('.meta').innerText(),
    error: await answers().last().locator('.error').innerText(),
  };
}

/** What the page asks of the API next. */
const nextRequest = async () => (await page.waitForRequest('**/v1/chat/completions')).postDataJSON();

/** Has the server answer the next chat with these events. */
const stream = (events, status = 200) => page.route('**/v1/chat/completions', (route) => route.fulfill({
  status,
  contentType: status === 200 ? 'text/event-stream' : 'application/json',
  body: status === 200 ? events.map((event) => `data: ${typeof event === 'string' ? event : JSON.stringify(event)}\n\n`).join('') : JSON.stringify(events),
}));
const piece = (content, finish_reason = null) => ({ choices: [{ index: 0, delta: { content }, finish_reason }], usage: null });

test('it shows the model and leads to the documentation', async () => {
  const { data: [model] } = await (await fetch(`${url}/v1/models`)).json();
  assert.equal(await page.locator('#model b').innerText(), model.id);
  assert.match(await page.locator('#model').innerText(), /Q4_1 · 135M weights · [\d,]+ tokens of context/);
  assert.match(await page.title(), new RegExp(model.id));
  await page.getByRole('link', { name: 'API' }).click();
  await page.locator('.opblock').first().waitFor();
  assert.equal(page.url(), `${url}/docs`);
});

test('an answer is streamed, measured and said once to who listens', async () => {
  await page.evaluate(() => {
    globalThis.said = [];
    const news = document.getElementById('news');
    new MutationObserver(() => said.push(news.textContent)).observe(news, { childList: true, characterData: true, subtree: true });
    globalThis.lengths = [];
    const grown = () => lengths.push(document.querySelector('.turn.model > .text')?.textContent.length ?? 0);
    new MutationObserver(grown).observe(document.getElementById('turns'), { childList: true, characterData: true, subtree: true });
  });
  const asked = nextRequest();
  await page.getByRole('button', { name: 'Why is the sky blue?' }).click();
  const body = await asked;
  assert.deepEqual(body.messages, [{ role: 'user', content: 'Why is the sky blue?' }]);
  assert.deepEqual([body.stream, body.stream_options], [true, { include_usage: true }]);
  assert.deepEqual([body.temperature, body.top_p, body.max_tokens, 'seed' in body], [0.7, 0.95, 512, false]);
  const { text, meta, error } = await answered();
  assert.ok(text.length > 20, text);
  assert.match(meta, /^\d+ tokens · [\d.,]+ tokens\/s · first after \d+\.\d\d s/);
  assert.equal(error, '');
  assert.ok(new Set(await page.evaluate(() => lengths)).size > 5, 'it came piece by piece');
  const said = await page.evaluate(() => globalThis.said);
  assert.deepEqual([said.length, said[0], said[1].startsWith('The model: ')], [2, 'The model is answering.', true]);
});

test('the conversation goes on, and begins anew', async () => {
  await page.getByLabel('Temperature').fill('0');
  await page.getByLabel('Max tokens').fill('4');
  await page.getByLabel('System prompt').fill('Be brief.');
  await say('My name is Ada.');
  const { text, meta } = await answered();
  assert.match(meta, /cut off: out of tokens$/);
  const asked = nextRequest();
  await say('What is my name?');
  assert.deepEqual((await asked).messages, [
    { role: 'system', content: 'Be brief.' }, { role: 'user', content: 'My name is Ada.' },
    { role: 'assistant', content: text }, { role: 'user', content: 'What is my name?' },
  ]);
  await answered();
  await page.getByRole('button', { name: 'New chat' }).click();
  assert.equal(await page.locator('.turn').count(), 0);
  const anew = nextRequest();
  await say('Hello.');
  assert.equal((await anew).messages.length, 2);
  await answered();
});

test('the same seed says the same', async () => {
  await page.getByLabel('Max tokens').fill('12');
  await page.getByLabel('Temperature').fill('1');
  const texts = [];
  for (const seed of [7, 7]) {
    await page.getByLabel('Seed').fill(String(seed));
    const asked = nextRequest();
    await say('Tell me something.');
    assert.deepEqual([(await asked).seed, (await asked).temperature], [7, 1]);
    texts.push((await answered()).text);
    await page.getByRole('button', { name: 'New chat' }).click();
  }
  assert.equal(texts[0], texts[1]);
});

test('a setting out of range is shown, not sent', async () => {
  await page.setViewportSize(NARROW);
  let sent = 0;
  page.on('request', (request) => { sent += request.url().endsWith('/completions'); });
  await page.getByRole('button', { name: 'Settings' }).click();
  await page.getByLabel('Temperature').fill('9');
  await page.getByRole('button', { name: 'Chat' }).click();
  await say('Hello.');
  await until(() => page.getByLabel('Temperature').evaluate((field) => field === document.activeElement), 'the field has the focus');
  assert.equal(await page.getByLabel('Temperature').isVisible(), true);
  assert.equal(sent, 0);
});

for (const [how, stop] of [
  ['the button', () => page.getByRole('button', { name: 'Stop' }).click()],
  ['the keyboard', () => page.keyboard.press('Escape')],
]) {
  test(`${how} stops an answer, and the server's work with it`, async () => {
    const cancelled = await metric('m40llm_outcomes_total{outcome="cancelled"}');
    await page.getByLabel('Max tokens').fill('4000');
    await say(LONG);
    await until(async () => /^\d\d+ tokens/.test(await answers().last().locator('.meta').innerText()), 'tokens come');
    await stop();
    const { text, meta, error } = await answered();
    assert.match(meta, / · stopped$/);
    assert.equal(error, '');
    assert.ok(text.length > 10);
    await until(async () => (await metric('m40llm_sequences_running')) === 0, 'nothing runs');
    await until(async () => (await metric('m40llm_outcomes_total{outcome="cancelled"}')) === cancelled + 1, 'it was cancelled');
    // What was said so far is part of the conversation.
    await page.getByLabel('Max tokens').fill('4');
    const asked = nextRequest();
    await say('Go on.');
    assert.equal((await asked).messages[1].content, text);
    await answered();
  });
}

test('what a model says is text, whatever it says', async () => {
  const nasty = '<img src=x onerror="document.title=\'owned\'"><script>document.title="owned"</script>\u2028 & &amp; **b**';
  await stream([piece(''), piece(nasty), piece('', 'stop'), '[DONE]']);
  await say(nasty);
  assert.equal((await answered()).text.includes('<img src=x onerror='), true);
  assert.equal(await answers().last().locator('> .text').evaluate((node) => node.textContent), nasty);
  assert.equal(await page.locator('.turn img, .turn script').count(), 0);
  assert.notEqual(await page.title(), 'owned');
  // Markup made of text is refused by the policy itself.
  await assert.rejects(page.evaluate(() => { document.body.innerHTML = '<p>no</p>'; }), /TrustedHTML/);
  assertClean(browser, /TrustedHTML/);
  browser.problems.length = 0;
});

test('what a model thinks is told apart from what it says', async () => {
  const thought = { choices: [{ index: 0, delta: { reasoning_content: 'The user says <b>hello</b>.' }, finish_reason: null }] };
  await stream([piece(''), thought, piece('Hello!'), piece('', 'stop'), '[DONE]']);
  await say('Hello.');
  assert.equal((await answered()).text, 'Hello!');
  const thoughts = answers().last().getByRole('group');
  assert.equal(await thoughts.locator('.text').isVisible(), false);
  await thoughts.getByText('Thoughts').click();
  assert.equal(await thoughts.locator('.text').innerText(), 'The user says <b>hello</b>.');
  await page.unrouteAll();
  await page.getByLabel('Max tokens').fill('4');
  const asked = nextRequest();
  await say('Again.');
  assert.equal((await asked).messages[1].content, 'Hello!');
  await answered();
});

test('what goes wrong is said in the conversation, and the question kept', async () => {
  const refusal = { error: { message: 'The queue is full.', type: 'server_error', param: null, code: 'overloaded' } };
  await stream(refusal, 503);
  await say('Hello.');
  assert.equal((await answered()).error, 'The queue is full.');
  assert.equal(await message().inputValue(), 'Hello.');
  await page.unrouteAll();
  await stream([piece('So'), { error: { ...refusal.error, message: 'The device is lost.' } }]);
  await say('Hello.');
  const failed = await answered();
  assert.deepEqual([failed.text, failed.error], ['So', 'The device is lost.']);
  await page.unrouteAll();
  await stream([piece('So')]);
  await say('Hello.');
  assert.equal((await answered()).error, 'The answer broke off before its end.');
  await page.unrouteAll();
  await page.route('**/v1/chat/completions', (route) => route.abort('connectionrefused'));
  await say('Hello.');
  assert.equal((await answered()).error, 'The server does not answer. Is it running?');
  await page.unrouteAll();
  await page.getByLabel('Max tokens').fill('4');
  const asked = nextRequest();
  await say('Hello.');
  assert.equal((await asked).messages.at(-1).content, 'Hello.');
  assert.equal((await answered()).error, '');
  const expected = /^503 |status of 503|ERR_CONNECTION_REFUSED/;
  assertClean(browser, expected);
  browser.problems.length = 0;
});

test('a model that is still loading is waited for', async () => {
  let times = 0;
  await page.route('**/v1/models', (route) => {
    times += 1;
    if (times > 1) return route.continue();
    return route.fulfill({ status: 503, contentType: 'application/json', body: '{"error":{"message":"The model is still loading; try again later."}}' });
  });
  await page.reload();
  await page.locator('#model', { hasText: 'still loading' }).waitFor();
  await page.locator('#model b').waitFor();
  assert.equal(times, 2);
  assertClean(browser, /^503 |status of 503/);
  browser.problems.length = 0;
});

test('the figures move', async () => {
  const words = (id) => page.locator(`#chart-${id} title`).textContent();
  const shape = () => page.locator('#chart-speed polyline').getAttribute('points');
  await until(async () => (await shape())?.split(' ').length >= 2, 'a line of two points');
  const before = await shape();
  await page.getByLabel('Max tokens').fill('2000');
  await say(LONG);
  await until(async () => /^1 sequences run, 0 wait$/.test(await words('requests')), 'one sequence runs');
  await until(async () => /: [1-9][\d.,]* now/.test(await words('speed')), 'tokens are generated');
  assert.match(await page.locator('#chart-kv b').innerText(), /^[1-9]\d* · \d+ \/ [\d,]+$/);
  await picture('wide-light');
  await page.keyboard.press('Escape');
  await answered();
  await until(async () => /^0 sequences run/.test(await words('requests')), 'nothing runs');
  assert.notEqual(await shape(), before);
  assert.match(await words('read'), /, [1-9][\d.,]* at most$/);
});

test('figures that nobody sees are not asked for', async () => {
  await page.setViewportSize(NARROW);
  let asked = 0;
  page.on('request', (request) => { asked += request.url().endsWith('/metrics'); });
  await page.waitForTimeout(2500);
  asked = 0;
  await page.waitForTimeout(5000);
  assert.equal(asked, 0);
  await page.getByRole('button', { name: 'Settings' }).click();
  await until(() => asked >= 2, 'two polls');
});

test('a keyboard reaches everything, in the order in which it is seen', async () => {
  const focused = () => page.evaluate(() => {
    const { id, tagName, textContent } = document.activeElement;
    return id || (tagName === 'BODY' ? 'the browser' : textContent);
  });
  assert.equal(await focused(), 'prompt', 'whoever comes can write at once');
  await message().press('Shift+Enter');
  assert.equal(await message().inputValue(), '\n');
  await message().fill('');
  const order = [];
  for (let i = 0; i < 15; i++) {
    await page.keyboard.press('Tab');
    order.push(await focused());
  }
  assert.deepEqual(order, [
    'send', 'the browser', 'Skip to the message', 'API', 'key', 'temperature', 'top_p', 'max_tokens', 'seed', 'system', 'transcript',
    'Why is the sky blue?', 'Write a short poem about the sea.', 'What is the capital of France?', 'prompt',
  ]);
  // Sending by the button leaves the focus where the next thing to do is.
  await page.getByLabel('Max tokens').fill('300');
  await message().fill(LONG);
  await page.getByRole('button', { name: 'Send' }).focus();
  await page.keyboard.press('Enter');
  assert.equal(await focused(), 'stop');
  await page.keyboard.press('Enter');
  await answered();
  assert.equal(await focused(), 'send');
});

for (const [width, viewport] of [['wide', WIDE], ['narrow', NARROW]]) {
  for (const colorScheme of ['light', 'dark']) {
    test(`axe-core finds nothing serious: ${width}, ${colorScheme}`, async () => {
      await page.emulateMedia({ colorScheme });
      await page.setViewportSize(viewport);
      await assertAccessible(page, 'at first');
      await page.getByRole('button', { name: 'What is the capital of France?' }).click();
      await answered();
      await stream({ error: { message: 'The queue is full.' } }, 503);
      await say('And of Spain?');
      await answered();
      await assertAccessible(page, 'in a conversation');
      const size = await page.evaluate(() => [document.documentElement.scrollWidth, innerWidth]);
      assert.ok(size[0] <= size[1], 'nothing is wider than the window');
      if (width === 'narrow' || colorScheme === 'dark') await picture(`${width}-${colorScheme}`);
      if (width === 'narrow') {
        await page.getByRole('button', { name: 'Settings' }).click();
        await page.locator('#chart-kv b', { hasText: '/' }).waitFor();
        await assertAccessible(page, 'settings');
        await picture(`settings-${colorScheme}`);
      }
      // The refused question of the picture with an error.
      assertClean(browser, /^503 |status of 503/);
      browser.problems.length = 0;
    });
  }
}

test('nothing was asked of another host, nothing failed', () => {
  assert.ok(browser.requested.length > 50);
  assertClean(browser);
});
