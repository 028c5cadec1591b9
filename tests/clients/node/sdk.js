// Where the live servers are (run.sh sets the variables), and what the SDKs are asked for: see ../python/sdk.py.

import assert from 'node:assert/strict';
import path from 'node:path';
import { z } from 'zod';

const { TEST_URL, TEST_MODEL, TEST_KEYED_URL, TEST_KEY, TEST_KEY_OF_METRICS, TEST_KEY_WITHOUT_TOKENS, TEST_FULL } = process.env;

export const url = TEST_URL;
export const modelId = path.basename(TEST_MODEL).replace(/\.gguf$/, '');
/** A server of the same model that asks for keys, with a context of 512 tokens. */
export const keyed = { url: TEST_KEYED_URL, key: TEST_KEY, keyOfMetrics: TEST_KEY_OF_METRICS, keyWithoutTokens: TEST_KEY_WITHOUT_TOKENS };
/** With run.sh --full. */
export const full = TEST_FULL === '1';

export const storyPrompt = 'Write a story about a cat.';
export const weatherPrompt = 'What is the weather in Paris?';
export const tooLong = 'hello '.repeat(600);
export const Review = z.object({ verdict: z.enum(['good', 'bad']), stars: z.number().int().min(1).max(5) });
export const Weather = z.object({ city: z.enum(['Paris', 'Rome']), days: z.number().int().min(1).max(9) });

async function metric(name, key) {
  const headers = key ? { authorization: `Bearer ${key}` } : {};
  const text = await (await fetch(`${key ? keyed.url : url}/metrics`, { headers })).text();
  const lines = text.split('\n').filter((line) => line.startsWith(name) && /^[{ ]/.test(line.slice(name.length)));
  assert.ok(lines.length > 0, `no ${name} in:\n${text}`);
  return lines.reduce((sum, line) => sum + Number(line.split(' ').at(-1)), 0);
}

async function becomes(condition, milliseconds) {
  for (const end = Date.now() + milliseconds; Date.now() < end; ) {
    if (await condition()) return true;
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
  return false;
}

/** The sum of the gauges of running sequences. */
export const running = () => metric('m40llm_sequences_running');
export const becomesIdle = (milliseconds) => becomes(async () => (await running()) === 0, milliseconds);

/** Does something while the server with keys has no place for another request. */
export async function whileFull(action) {
  const end = new AbortController();
  const occupy = async () => {
    while (!end.signal.aborted) {
      const answer = await fetch(`${keyed.url}/v1/completions`, {
        method: 'POST',
        headers: { 'content-type': 'application/json', authorization: `Bearer ${keyed.key}` },
        body: JSON.stringify({ prompt: '1, 2, 3,', max_tokens: 480, temperature: 1.8 }),
        signal: end.signal,
      });
      await answer.text();
    }
  };
  const occupants = [occupy(), occupy()];
  const waiting = () => metric('m40llm_sequences_waiting', keyed.keyOfMetrics);
  try {
    assert.ok(await becomes(async () => (await waiting()) === 1, 30_000), 'nobody waits');
    await action();
  } finally {
    end.abort();
    await Promise.allSettled(occupants);
    assert.ok(await becomes(async () => (await metric('m40llm_sequences_running', keyed.keyOfMetrics)) === 0, 30_000));
  }
}
