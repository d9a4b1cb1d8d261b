// Where the page gets its answers: from the server, or from what a report holds.
import { columnOf, unpackAll } from './arrays.js';

const KEPT = 60; // answers in memory

/** Asks the server. */
export class ServerSource {
  constructor() {
    this.live = true;
    this.kept = new Map();
  }

  /** Asks for all runs, never from memory; what was kept of runs that went on is forgotten. */
  async overview() {
    const response = await fetch('./data/overview');
    if (!response.ok) throw new Error(`the server answered ${response.status}`);
    const overview = await response.json();
    const version = overview.runs.map((run) => `${run.name}:${run.version}`).join();
    if (version !== this.version) this.kept.clear();
    this.version = version;
    return overview;
  }

  /**
   * Asks a question, see `stabnorm.dashboard.answers`.
   * @param {string} question
   * @param {Object} about - its arguments; those that are null are left out.
   * @returns {Promise<Object>}
   */
  ask(question, about) {
    const address = this.address(question, about);
    if (!this.kept.has(address)) {
      const answer = fetch(address).then(async (response) => {
        const body = await response.json();
        if (!response.ok) throw new Error(body.error || String(response.status));
        return unpackAll(body);
      });
      answer.catch(() => this.kept.delete(address));
      this.kept.set(address, answer);
      if (this.kept.size > KEPT) this.kept.delete(this.kept.keys().next().value);
    }
    return this.kept.get(address);
  }

  /** The address of a question. */
  address(question, about) {
    const known = Object.entries(about).filter(([, value]) => value !== null && value !== undefined);
    return `./data/${question}?${new URLSearchParams(known)}`;
  }
}

/** Answers from the data that a report holds, at the resolution at which it was written. */
export class ReportSource {
  /** @param {{overview: Object, answers: Object}} data */
  constructor(data) {
    this.live = false;
    this.data = data;
    this.unpacked = new Map();
  }

  async overview() {
    return this.data.overview;
  }

  async ask(question, about) {
    if (question === 'layer') return this.layer(about);
    const answer = this.whole(question, about);
    if (!answer) throw new Error('the report does not hold this; run `stabnorm view` on the run to see it');
    return answer.edges ? cut(answer, about) : answer;
  }

  whole(question, { run = '', statistic = '', companion = '' }) {
    const key = [question, run, companion, statistic].join('\n');
    if (!this.unpacked.has(key)) {
      const answer = this.data.answers[key];
      this.unpacked.set(key, answer ? unpackAll(answer) : null);
    }
    return this.unpacked.get(key);
  }

  /** Puts a layer's card together from the maps. */
  layer(about) {
    const map = this.whole('map', about);
    const part = this.data.overview.runs.find((run) => run.name === about.run).parts
      .find(({ companion }) => companion === (about.companion || ''));
    const row = map.layers.indexOf(about.layer);
    const rows = map.layers.length;
    const shown = cut(map, about);
    const column = (values) => shown.edges.slice(0, -1).map((_, i) => values[i * rows + row]);
    const usual = column(shown.usual), scale = column(shown.scale);
    const at = (of, values) => values[Math.max(0, columnOf(of.edges, about.step)) * of.layers.length + row];
    const table = part.statistics.map((statistic) => {
      const of = this.whole('map', { ...about, statistic });
      if (!of) return null;
      const value = at(of, of.value), known = at(of, of.usual);
      return { statistic, value, usual: known, sigmas: Math.log(value / known) / at(of, of.scale), every: of.every };
    }).filter(Boolean);
    const slice = (values) => values.slice(columnOf(map.edges, about.step) * rows).slice(0, rows);
    const others = {};
    for (const run of this.data.overview.runs) {
      const other = run.name !== about.run && this.whole('map', { ...about, run: run.name });
      const place = other ? other.layers.indexOf(about.layer) : -1;
      if (place < 0) continue;
      others[run.name] = shown.edges.slice(0, -1).map((step) => {
        const from = columnOf(other.edges, step);
        return from < 0 ? NaN : other.high[from * other.layers.length + place];
      });
    }
    return {
      layer: about.layer, step: about.step, edges: shown.edges, table, others, channels: null,
      band: {
        low: column(shown.low), high: column(shown.high), usual,
        under: usual.map((x, i) => x * Math.exp(-6 * scale[i])), over: usual.map((x, i) => x * Math.exp(6 * scale[i])),
      },
      profile: { value: slice(map.value), usual: slice(map.usual) },
    };
  }
}

/** Cuts the columns of a window out of an answer. */
function cut(answer, { first = null, last = null }) {
  if (first === null && last === null) return answer;
  const count = answer.edges.length - 1;
  const from = Math.max(0, answer.edges.findIndex((edge) => edge > (first ?? 0)) - 1);
  const after = last === null ? -1 : answer.edges.findIndex((edge) => edge > last);
  const to = Math.max(from + 1, after < 0 ? count : after);
  const cutOf = (value) => {
    if (value instanceof Float32Array) {
      const rows = value.length / count;
      return value.slice(from * rows, to * rows);
    }
    return value && value.constructor === Object
      ? Object.fromEntries(Object.entries(value).map(([name, inner]) => [name, cutOf(inner)])) : value;
  };
  const names = Object.entries(answer).filter(([name]) => name !== 'edges');
  return { edges: answer.edges.slice(from, to + 1), ...Object.fromEntries(names.map(([name, value]) => [name, cutOf(value)])) };
}
