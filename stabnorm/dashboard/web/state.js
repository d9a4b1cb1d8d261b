// What the reader is looking at. Every panel reads it, and a change redraws them.

/**
 * @typedef {Object} State
 * @property {string} run
 * @property {string} companion - '' for the norms.
 * @property {string} statistic
 * @property {'times'|'value'|'sigmas'} colour
 * @property {'depth'|'worst'} order - of the rows.
 * @property {string} filter - for the names of the rows.
 * @property {string} layer
 * @property {number|null} step - the pinned one.
 * @property {number|null} first - of the window; null for the whole run.
 * @property {number|null} last
 * @property {Set<string>} open - blocks whose layers are shown one by one.
 */

const VALUES = ['lam', 'branch_gap', 'tokens']; // have no past that would be usual

/** Keeps the state, and tells who listens about changes. */
export class Store {
  /** @param {Object} start - what the address held. */
  constructor(start) {
    this.state = {
      run: '', companion: '', statistic: '', colour: 'times', order: 'depth', filter: '', layer: '', step: null, first: null,
      last: null, open: new Set(), ...start,
    };
    this.overview = { runs: [], definitions: {}, learnt: 48, armed: 256, bound: 6 };
    this.listeners = [];
  }

  /** Calls a listener after each change. */
  listen(listener) {
    this.listeners.push(listener);
  }

  /** Changes some of the state. */
  set(changes) {
    Object.assign(this.state, changes);
    this.listeners.forEach((listener) => listener(this.state));
  }

  /** Takes in the runs, and chooses what to look at where nothing is chosen: the worst run, at its first onset. */
  take(overview) {
    this.overview = overview;
    const { state } = this;
    const known = this.run;
    if (!known) {
      state.run = overview.runs.length ? overview.runs[0].name : '';
      Object.assign(state, { companion: '', layer: '' });
    }
    if (!this.part) state.companion = '';
    if (!this.part) return;
    if (!this.part.layers.includes(state.layer)) {
      const { statistic, step } = state; // an address may name them and no layer
      if (state.companion) [state.layer] = this.part.layers;
      else this.lookAt(this.run.onsets[0]);
      if (this.part.statistics.includes(statistic)) state.statistic = statistic;
      state.step = step ?? state.step;
    }
    if (!this.part.statistics.includes(state.statistic)) state.statistic = this.usualStatistic();
  }

  /** Moves everything to an onset, without telling anybody. */
  lookAt(onset) {
    const { state } = this;
    const part = onset && this.run.parts.find(({ layers }) => layers.includes(onset.layer));
    if (!part) {
      state.step = state.step ?? null;
      if (this.part && !this.part.layers.includes(state.layer)) [state.layer] = this.part.layers;
      return;
    }
    state.companion = part.companion;
    state.statistic = onset.kind === 'past' && part.statistics.includes(onset.statistic) ? onset.statistic : this.usualStatistic();
    Object.assign(state, { layer: onset.layer, step: onset.step });
    const { first, last } = state;
    if (first !== null && (onset.step < first || onset.step > last)) Object.assign(state, { first: null, last: null });
  }

  usualStatistic() {
    const known = this.part.statistics;
    return ['token_std_mean', 'amax'].find((name) => known.includes(name)) || known[0] || '';
  }

  /** The card of the run that is looked at. */
  get run() {
    return this.overview.runs.find(({ name }) => name === this.state.run);
  }

  /** Layers and statistics of the norms, or of the companion that is looked at. */
  get part() {
    return this.run && this.run.parts.find(({ companion }) => companion === this.state.companion);
  }

  /** The colours that are shown: of some series only the value means anything. */
  get colour() {
    return this.hasPast && !this.isEarly ? this.state.colour : 'value';
  }

  /** Whether the run is too short to know what is usual. */
  get isEarly() {
    return Boolean(this.run) && this.run.steps[1] - this.run.steps[0] < this.overview.learnt;
  }

  /** Whether the statistic has a past that later values may be compared with. */
  get hasPast() {
    return !VALUES.includes(this.state.statistic);
  }

  /** What is known of a statistic. */
  definition(name) {
    return this.overview.definitions[name] || { plain: name, formula: '', unit: '1', axis: 'layer', bad_when: '', advice: '' };
  }

  /** The window that is shown: from the first to the last step. */
  get window() {
    const [first, last] = this.run ? this.run.steps : [0, 0];
    return { first: this.state.first ?? first, last: this.state.last ?? last };
  }
}
