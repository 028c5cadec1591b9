// The server: how it is asked, what it says of itself, and its figures as they go.

const byId = (id) => document.getElementById(id);
const key = byId('key');

/** An answer that is not 2xx. Its message is the server's own. */
class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** Asks the server, with the key if there is one. Paths are relative, so that a proxy may put a prefix before all. */
async function ask(path, options = {}) {
  if (/[^\x21-\x7e]/.test(key.value)) throw new Refused(401, 'The API key holds characters that no key has.');
  const headers = { ...options.headers };
  if (key.value) headers.authorization = `Bearer ${key.value}`;
  let response;
  try {
    response = await fetch(path, { cache: 'no-store', ...options, headers });
  } catch (error) {
    if (error.name === 'AbortError') throw error;
    throw new Error('The server does not answer. Is it running?', { cause: error });
  }
  if (response.ok) return response;
  const body = await response.json().catch(() => ({}));
  throw new Refused(response.status, body.error?.message ?? `The server answered with status ${response.status}.`);
}

/** The data of a response's server-sent events; here each is one line. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = '';
  for (;;) {
    const { done, value } = await reader.read().catch((error) => {
      throw error.name === 'AbortError' ? error : new Error('The connection to the server is lost.', { cause: error });
    });
    if (done) return;
    const lines = (rest + value).split('\n');
    rest = lines.pop();
    for (const line of lines) if (line.startsWith('data: ')) yield line.slice(6);
  }
}

const count = (n) => n.toLocaleString('en');
const rate = (n) => (n < 10 ? n.toFixed(1) : count(Math.round(n)));

/** The loaded model's id; empty, which means it too, until it is known. */
let model = '';
let asking;

/** Shows the model's name, and asks again as long as there is none. */
async function greet() {
  clearTimeout(asking);
  const line = byId('model');
  try {
    const { id, meta } = (await (await ask('v1/models')).json()).data[0];
    const name = document.createElement('b');
    name.textContent = id;
    const facts = [meta.quantization, `${count(Math.round(meta.parameters / 1e6))}M weights`,
      `${count(meta.context_length)} tokens of context`];
    line.replaceChildren(name, ` · ${facts.join(' · ')}`);
    document.title = `${id} · m40llm`;
    model = id;
    keyIsWrong('');
  } catch (error) {
    line.textContent = error.message;
    if (error.status === 401 || error.status === 403) {
      line.textContent = key.value ? 'The key is refused' : 'This server asks for an API key';
      keyIsWrong(key.value ? error.message : 'This server asks for an API key: m40llm keys create --name me');
    } else {
      asking = setTimeout(greet, 2000);
    }
  }
}

/** Says by the key's field what is wrong with it; nothing, when `message` is empty. */
function keyIsWrong(message) {
  byId('key-error').textContent = message;
  key.setAttribute('aria-invalid', String(message !== ''));
}

// Figures: two minutes of them, a point every two seconds.
const PERIOD = 2000;
const POINTS = 61;
const SCOPE = 'These figures are for keys with the scope “metrics”: m40llm keys create --name me --scope inference --scope metrics';
let figures = [];
let watching = false;
let refused = false;

/** The page's samples without labels, by name. */
function samples(text) {
  const lines = text.split('\n').filter((line) => /^m40llm_\w+ /.test(line));
  return Object.fromEntries(lines.map((line) => line.slice(7).split(' ')).map(([name, value]) => [name, Number(value)]));
}

/** Whether somebody can see the figures. */
const isWatched = () => !document.hidden && byId('server').offsetParent !== null;

/** Asks for the figures, unless the last answer is still awaited or was that this key may not. */
async function watch() {
  if (watching || refused || !isWatched()) return;
  watching = true;
  let wrong = '';
  try {
    const now = samples(await (await ask('metrics')).text());
    const gap = performance.now() - (figures.at(-1)?.at ?? 0);
    // Nobody looked for a while: what was seen before is old.
    figures = [...(gap > 3 * PERIOD ? [] : figures), { ...now, at: performance.now() }].slice(-POINTS - 1);
    draw();
  } catch (error) {
    // Asking on with such a key would count as guessing keys.
    refused = error.status === 401 || error.status === 403;
    wrong = refused ? SCOPE : error.message;
  }
  watching = false;
  byId('metrics-note').textContent = wrong;
  byId('charts').hidden = refused;
}

/** Draws `lines` (newest last) into a figure, the tallest at `most` or at its own peak, and says it in words. */
function plot(id, lines, most, value, words) {
  const figure = byId(id);
  const top = Math.max(most, ...lines.flat()) || 1;
  lines.forEach((line, i) => {
    const points = line.map((v, x) => `${x + POINTS - line.length},${(20 - (v / top) * 19).toFixed(2)}`);
    figure.querySelectorAll('polyline')[i].setAttribute('points', points.join(' '));
    if (i > 0 || points.length === 0) return;
    figure.querySelector('polygon').setAttribute('points', [`${POINTS - line.length},20`, ...points, `${POINTS - 1},20`].join(' '));
  });
  figure.querySelector('b').textContent = value;
  figure.querySelector('title').textContent = words;
}

function draw() {
  const last = figures.at(-1);
  const recent = figures.slice(1);
  const gauge = (name) => recent.map((now) => now[name]);
  const speed = (name) => recent.map((now, i) => {
    const before = figures[i];
    // A counter that falls belongs to a server that was started again.
    return Math.max(0, now[name] - before[name]) / ((now.at - before.at) / 1000);
  });
  for (const [id, name, what] of [
    ['chart-speed', 'generated_tokens_total', 'Tokens generated per second'],
    ['chart-read', 'prompt_tokens_total', 'Prompt tokens read per second'],
  ]) {
    const line = speed(name);
    const now = line.at(-1) ?? 0;
    plot(id, [line], 1, rate(now), `${what}: ${rate(now)} now, ${rate(Math.max(0, ...line))} at most`);
  }
  const { sequences_running: running, sequences_waiting: waiting } = last;
  plot('chart-requests', [gauge('sequences_running'), gauge('sequences_waiting')], 1,
    `${count(running)} · ${count(waiting)}`, `${count(running)} sequences run, ${count(waiting)} wait`);
  const { kv_blocks: all, kv_blocks_used: used, kv_blocks_cached: kept } = last;
  plot('chart-kv', [gauge('kv_blocks_used'), gauge('kv_blocks_cached')], all, `${count(used)} · ${count(kept)} / ${count(all)}`,
    `Of ${count(all)} KV cache blocks ${count(used)} are in use and ${count(kept)} kept for the prompts they hold`);
}

key.value = sessionStorage.getItem('api-key') ?? '';
key.addEventListener('change', () => {
  key.value = key.value.trim();
  sessionStorage.setItem('api-key', key.value);
  refused = false;
  figures = [];
  greet();
  watch();
});
document.addEventListener('visibilitychange', watch);
setInterval(watch, PERIOD);
