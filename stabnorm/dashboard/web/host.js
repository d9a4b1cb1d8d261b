// What the page asks of the place where it is shown: TensorBoard's tab, or a window of its own.

/**
 * Calls back when TensorBoard has read new data. Its protocol is experimental, so nothing depends on it.
 * @param {function(): Promise<void>} callback
 */
export function onReload(callback) {
  if (window.parent === window) return;
  try {
    const channel = new MessageChannel();
    channel.port1.addEventListener('message', async (event) => {
      const message = JSON.parse(event.data);
      if (message.isReply) return;
      if (message.type === 'experimental.DataReloaded') await callback();
      channel.port1.postMessage(JSON.stringify({ type: message.type, id: message.id, payload: null, error: null, isReply: true }));
    });
    channel.port1.start();
    window.parent.postMessage('experimental.bootstrap', '*', [channel.port2]);
  } catch {
    // Without it the page asks for new data by itself.
  }
}

/** TensorBoard's own document, or null where the page has a window of its own. */
function outer() {
  try {
    return window.parent !== window && window.parent.document.body ? window.parent : null;
  } catch {
    return null;
  }
}

/**
 * Keeps the page's theme equal to TensorBoard's, or to the system's.
 * @param {function(): void} redraw - called when it changes.
 */
export function followTheme(redraw) {
  const parent = outer();
  const system = window.matchMedia('(prefers-color-scheme: dark)');
  const apply = () => {
    const dark = parent ? parent.document.body.classList.contains('dark-mode') : system.matches;
    const theme = dark ? 'dark' : 'light';
    if (document.documentElement.dataset.theme === theme) return;
    document.documentElement.dataset.theme = theme;
    redraw();
  };
  apply();
  system.addEventListener('change', apply);
  if (parent) new MutationObserver(apply).observe(parent.document.body, { attributes: true, attributeFilter: ['class'] });
}

const KEPT = ['run', 'companion', 'statistic', 'colour', 'layer', 'step', 'first', 'last'];

/** Reads from the address what the reader was looking at. */
export function readAddress() {
  const hash = (outer() || window).location.hash.slice(1).replace(/^stabnorm&?/, '');
  const read = new URLSearchParams(hash);
  const state = {};
  for (const name of KEPT) {
    if (!read.has(name)) continue;
    const text = read.get(name);
    state[name] = ['step', 'first', 'last'].includes(name) ? Number(text) : text;
  }
  return state;
}

/** Writes into the address what the reader is looking at, so that it can be sent to somebody else. */
export function writeAddress(state) {
  const place = outer() || window;
  const kept = KEPT.filter((name) => state[name] !== null && state[name] !== undefined && state[name] !== '');
  const text = new URLSearchParams(kept.map((name) => [name, state[name]])).toString();
  const hash = place === window ? `#${text}` : `#stabnorm&${text}`;
  try {
    place.history.replaceState(place.history.state, '', place.location.pathname + place.location.search + hash);
  } catch {
    // A report opened from a file may not change its address.
  }
}
