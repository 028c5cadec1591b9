// openai-node against a live server; run.sh sets TEST_URL and TEST_MODEL.

import assert from 'node:assert/strict';
import path from 'node:path';
import { test } from 'node:test';
import OpenAI from 'openai';

const url = process.env.TEST_URL;
const modelId = path.basename(process.env.TEST_MODEL).replace(/\.gguf$/, '');
// No retries: a retried 503 would hide it.
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: 'unused', maxRetries: 0, timeout: 300_000 });
const story = [{ role: 'user', content: 'Write a story about a cat.' }];
const count = '1, 2, 3, 4, 5, 6, 7, 8, 9,';

const chat = (more = {}) => client.chat.completions.create({ model: '', messages: story, max_tokens: 16, temperature: 0, ...more });
const complete = (more = {}) => client.completions.create({ model: '', prompt: count, max_tokens: 16, temperature: 0, ...more });

async function streamedText(stream) {
  let text = '';
  for await (const chunk of stream) text += chunk.choices[0]?.delta?.content ?? chunk.choices[0]?.text ?? '';
  return text;
}

/** The sum of the gauges of running sequences. */
async function running() {
  const text = await (await fetch(`${url}/metrics`)).text();
  const lines = text.split('\n').filter((line) => /^m40llm_sequences_running[ {]/.test(line));
  assert.ok(lines.length > 0, `no gauge of running sequences in:\n${text}`);
  return lines.reduce((sum, line) => sum + Number(line.split(' ').at(-1)), 0);
}

async function becomesIdle(milliseconds) {
  for (const end = Date.now() + milliseconds; Date.now() < end; ) {
    if ((await running()) === 0) return true;
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
  return false;
}

test('a chat answer', async () => {
  const answer = await chat();
  assert.equal(answer.object, 'chat.completion');
  assert.equal(answer.model, modelId);
  assert.equal(answer.choices[0].message.role, 'assistant');
  assert.ok(answer.choices[0].message.content.length > 0);
  assert.equal(answer.choices[0].finish_reason, 'length');
  assert.equal(answer.usage.completion_tokens, 16);
  assert.ok(answer._request_id);
});

test('a streamed chat equals the unstreamed', async () => {
  const whole = await chat();
  assert.equal(await streamedText(await chat({ stream: true })), whole.choices[0].message.content);
});

test('the stream helper assembles the same message, with usage', async () => {
  const whole = await chat();
  const helper = client.chat.completions.stream({
    model: '', messages: story, max_tokens: 16, temperature: 0, stream_options: { include_usage: true },
  });
  const final = await helper.finalChatCompletion();
  assert.equal(final.choices[0].message.content, whole.choices[0].message.content);
  assert.equal(final.choices[0].message.role, 'assistant');
  assert.equal(final.choices[0].finish_reason, 'length');
  assert.deepEqual(final.usage, whole.usage);
});

test('completions, streamed and not, with a stop string', async () => {
  const whole = await complete({ max_tokens: 48, stop: [', 12'] });
  assert.equal(whole.choices[0].text, ' 10, 11');
  assert.equal(whole.choices[0].finish_reason, 'stop');
  assert.equal(await streamedText(await complete({ max_tokens: 48, stop: ', 12', stream: true })), ' 10, 11');
});

test('characters of several tokens arrive whole', async () => {
  const pieces = [];
  for await (const chunk of await complete({ prompt: '🦀\n'.repeat(8), max_tokens: 24, stream: true })) {
    pieces.push(chunk.choices[0].text);
  }
  assert.ok(pieces.join('').startsWith('🦀\n🦀\n🦀\n'), pieces.join(''));
  assert.ok(pieces.every((piece) => !piece.includes('\uFFFD')));
});

test('eight streams at once equal one after another', async () => {
  const prompts = ['Once upon a time', 'def f(n):', count, 'The capital of France is', 'SELECT', 'In 1969', '# Title\n', 'Dear Sir,'];
  const alone = [];
  for (const prompt of prompts) alone.push((await complete({ prompt })).choices[0].text);
  const together = await Promise.all(prompts.map(async (prompt) => streamedText(await complete({ prompt, stream: true }))));
  assert.deepEqual(together, alone);
});

test('the same seed gives the same text', async () => {
  const sample = async (seed) => (await chat({ temperature: 1.2, seed })).choices[0].message.content;
  assert.equal(await sample(1), await sample(1));
  assert.notEqual(await sample(1), await sample(2));
});

test('logprobs', async () => {
  const answer = await chat({ logprobs: true, top_logprobs: 2, max_tokens: 4 });
  assert.equal(answer.choices[0].logprobs.content.length, 4);
  for (const entry of answer.choices[0].logprobs.content) assert.equal(entry.top_logprobs.length, 2);
});

test('errors are the classes of the SDK', async () => {
  await assert.rejects(chat({ model: 'gpt-nonsense' }), (error) => {
    assert.ok(error instanceof OpenAI.NotFoundError);
    assert.equal(error.code, 'model_not_found');
    return true;
  });
  await assert.rejects(chat({ temperature: 9 }), (error) => {
    assert.ok(error instanceof OpenAI.BadRequestError);
    assert.equal(error.param, 'temperature');
    assert.equal(error.type, 'invalid_request_error');
    return true;
  });
  await assert.rejects(chat({ messages: [{ role: 'user', content: 'hello '.repeat(3000) }], stream: true }), (error) => {
    assert.ok(error instanceof OpenAI.BadRequestError);
    assert.equal(error.code, 'context_length_exceeded');
    return true;
  });
});

test('models', async () => {
  const models = [];
  for await (const model of client.models.list()) models.push(model.id);
  assert.deepEqual(models, [modelId]);
  assert.equal((await client.models.retrieve(modelId)).id, modelId);
});

test('aborting a stream ends the work', async () => {
  const stream = await complete({ max_tokens: 1900, temperature: 1.8, stream: true });
  for await (const chunk of stream) {
    assert.ok(chunk.id);
    assert.ok((await running()) >= 1);
    stream.controller.abort();
    break;
  }
  assert.ok(await becomesIdle(4000));
});

test('aborting an unstreamed request ends the work', async () => {
  const abort = new AbortController();
  const asked = client.completions.create({ model: '', prompt: count, max_tokens: 1900, temperature: 1.8 }, { signal: abort.signal });
  setTimeout(() => abort.abort(), 400);
  await assert.rejects(asked, OpenAI.APIUserAbortError);
  assert.ok(await becomesIdle(4000));
});
