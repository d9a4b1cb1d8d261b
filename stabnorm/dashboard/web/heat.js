// The map of layers by steps: one picture of all layers.
import { Axis, RIGHT } from './axis.js';
import { columnOf } from './arrays.js';
import { element, fitted, number, shared, sharp, shortName, stepText, visible } from './dom.js';
import { LOST, css, missing, scaleOf, themeColours } from './colours.js';
import { MOST, cellOf, cellValue, rowsOf } from './rows.js';
import { drawMarks } from './timeline.js';

const TOP = 2;
const BOTTOM = 20;

/**
 * Finds room for the names at the left.
 * @param {string[]} names
 * @param {number} width - of the whole panel.
 * @returns {number} in pixels.
 */
export function leftOf(names, width) {
  const context = document.createElement('canvas').getContext('2d');
  context.font = 'bold 11px system-ui, sans-serif'; // as the chosen one is written
  const hidden = shared(names);
  const longest = names.reduce((most, name) => Math.max(most, context.measureText(visible(name.slice(hidden))).width), 40) + (names.length > MOST ? 24 : 0);
  return Math.ceil(Math.min(longest + 12, width * 0.3));
}

/** What is drawn, so that the pointer can be answered. */
export class HeatMap {
  /**
   * @param {HTMLCanvasElement} canvas
   * @param {import('./state.js').Store} store
   * @param {Object} map - the answer to `map`.
   * @param {Object} range - the answer to `range`, for the colours of values.
   * @param {{left: number, width: number}} plot
   */
  constructor(canvas, store, map, range, { left, width }) {
    Object.assign(this, { canvas, store, map, left, width });
    this.scale = scaleOf(store.colour, range);
    this.rows = rowsOf(map, { ...store.state, colour: store.colour }, this.scale.rank);
    this.axis = new Axis(left, width, map.edges[0], map.edges[map.edges.length - 1]);
    this.rowHeight = Math.min(30, Math.max(7, Math.floor(420 / Math.max(1, this.rows.length))));
    this.height = this.rows.length * this.rowHeight;
    this.draw();
  }

  /** Whether the detector compares this statistic with the past. */
  get watched() {
    const { floor } = this.store.definition(this.store.state.statistic);
    return floor !== null && floor !== undefined;
  }

  draw() {
    const { map, store, rows, left, width, height, rowHeight, axis } = this;
    const context = sharp(this.canvas, left + width + RIGHT, TOP + height + BOTTOM);
    const colours = themeColours();
    const columns = map.edges.length - 1;
    const picture = new ImageData(columns, Math.max(1, rows.length));
    rows.forEach((row, y) => {
      for (let x = 0; x < columns; x++) {
        const at = cellOf(map, row, x, store.colour, this.scale.rank);
        picture.data.set([...this.colour(at), 255], 4 * (y * columns + x));
      }
    });
    const small = document.createElement('canvas');
    [small.width, small.height] = [columns, Math.max(1, rows.length)];
    small.getContext('2d').putImageData(picture, 0, 0);
    context.imageSmoothingEnabled = false;
    const shown = (map.edges[columns] - map.edges[0]) / (axis.end - axis.first);
    context.drawImage(small, left, TOP, width * shown, height);
    this.hatchAll(context, colours);
    this.names(context, colours);
    context.strokeStyle = colours.panel;
    if (rowHeight > 9) {
      for (let y = 1; y < rows.length; y++) context.strokeRect(left, TOP + y * rowHeight, width, 0);
    }
    drawMarks(context, axis, store, TOP, TOP + height, false);
    for (const onset of store.run.onsets) this.outline(context, onset.layer, onset.step, colours.alert);
    if (store.state.step !== null) this.outline(context, store.state.layer, store.state.step, colours.accent);
    axis.draw(context, TOP + height);
    this.canvas.setAttribute('aria-label', `${store.definition(store.state.statistic).plain}: ${rows.length} rows by steps ${axis.first} to ${axis.end - 1}`);
  }

  colour(at) {
    const { map, store } = this;
    if (map.lost[at] || Math.abs(map.high[at]) === Infinity || map.low[at] === -Infinity) return LOST;
    const value = cellValue(map, store.colour, at);
    return Number.isNaN(value) ? missing() : this.scale.colour(value);
  }

  /** Hatches where no alert against the past is possible: while a layer learns, and when its own norm is gone. */
  hatchAll(context, colours) {
    const { map, rows, rowHeight, axis } = this;
    rows.forEach((row, y) => {
      const armed = map.armed[row.layers[0]], faded = map.faded[row.layers[0]];
      if (this.watched) this.hatch(context, axis.first, armed ?? axis.end, y * rowHeight, colours.faint);
      if (faded !== null) this.hatch(context, faded, axis.end, y * rowHeight, colours.accent);
    });
  }

  hatch(context, from, to, y, colour) {
    const { axis, rowHeight } = this;
    const begin = axis.x(Math.max(from, axis.first)), end = axis.x(Math.min(to, axis.end));
    if (end <= begin) return;
    context.save();
    context.beginPath();
    context.rect(begin, TOP + y, end - begin, rowHeight);
    context.clip();
    context.strokeStyle = colour;
    context.globalAlpha = 0.28;
    context.beginPath();
    // Lines meet those of the row above, because they are counted from the same corner.
    for (let x = Math.floor((begin - rowHeight) / 8) * 8 - (y % 8); x < end; x += 8) {
      context.moveTo(x, TOP + y + rowHeight);
      context.lineTo(x + rowHeight, TOP + y);
    }
    context.stroke();
    context.restore();
  }

  names(context, colours) {
    const { rows, rowHeight, left, store } = this;
    const every = Math.ceil(11 / rowHeight);
    const hidden = shared(this.map.layers);
    context.textAlign = 'right';
    context.textBaseline = 'middle';
    rows.forEach((row, y) => {
      const chosen = row.layers.some((i) => this.map.layers[i] === store.state.layer);
      if (y % every && !chosen) return;
      context.fillStyle = chosen ? colours.alert : colours.text;
      context.font = `${chosen ? 'bold ' : ''}11px system-ui, sans-serif`;
      context.fillText(fitted(context, row.name.slice(hidden), left - 10), left - 6, TOP + (y + 0.5) * rowHeight);
    });
    context.font = '11px system-ui, sans-serif';
  }

  /** Draws a frame around the cell of a layer and a step. */
  outline(context, layer, step, colour) {
    const { axis, rowHeight, map } = this;
    const y = this.rows.findIndex((row) => row.layers.some((i) => map.layers[i] === layer));
    if (y < 0 || step < axis.first || step >= axis.end) return;
    const column = columnOf(map.edges, step);
    const from = axis.x(map.edges[column]), to = axis.x(map.edges[column + 1]);
    const wide = Math.max(to - from, 9), middle = (from + to) / 2;
    // The outer line tells the frame from a cell of its own colour.
    for (const [stroke, lineWidth] of [[themeColours().panel, 4], [colour, 2]]) {
      Object.assign(context, { strokeStyle: stroke, lineWidth });
      context.strokeRect(middle - wide / 2, TOP + y * rowHeight + 2, wide, rowHeight - 4);
    }
    context.lineWidth = 1;
  }

  /**
   * Finds what lies under the pointer.
   * @param {MouseEvent} event
   * @returns {{row: Object, layer: string, column: number, at: number, step: number}|null}
   */
  under(event) {
    const box = this.canvas.getBoundingClientRect();
    const x = event.clientX - box.left, y = Math.floor((event.clientY - box.top - TOP) / this.rowHeight);
    const row = this.rows[y];
    if (!row) return null;
    if (x < this.left) return { row, layer: null };
    if (x > this.left + this.width) return null;
    const pointed = this.axis.step(x);
    const column = columnOf(this.map.edges, pointed);
    if (column < 0) return null;
    const at = cellOf(this.map, row, column, this.store.colour, this.scale.rank);
    const layer = this.map.layers[at % this.map.layers.length];
    return { row, layer, column, at, step: this.map.step[at] >= 0 ? this.map.step[at] : pointed };
  }

  /** Says what lies under the pointer. */
  describe({ layer, column, at, step }) {
    const { map, store } = this;
    const definition = store.definition(store.state.statistic);
    const span = map.edges[column + 1] - map.edges[column];
    const where = span > 1 ? `step ${stepText(step)} (furthest of ${stepText(map.edges[column])} to ${stepText(map.edges[column + 1] - 1)})` : `step ${stepText(step)}`;
    const unit = ['1', 'x', ''].includes(definition.unit) ? '' : ` ${definition.unit}`;
    const parts = [visible(layer), where, `${definition.plain} ${map.lost[at] ? 'NaN' : number(map.value[at])}${unit}`];
    if (!Number.isNaN(map.usual[at])) {
      const times = map.value[at] / map.usual[at];
      parts.push(`usual ${number(map.usual[at])}`, `\u00d7${number(times)}`, `${number(Math.log(times) / map.scale[at])} \u03c3`);
    } else if (!map.lost[at]) parts.push('it is too early to know what is usual');
    if (span > 1) parts.push(`from ${number(map.low[at])} to ${number(map.high[at])} in this column`);
    return parts.join(' \u00b7 ');
  }

  /** Draws the legend of the colours. */
  legend(place) {
    const ramp = document.createElement('canvas');
    [ramp.width, ramp.height] = [120, 10];
    const context = ramp.getContext('2d');
    const { kind, ends } = this.scale;
    const hidden = shared(this.map.layers);
    for (let x = 0; x < 120; x++) {
      const part = x / 119;
      const value = kind === 'times' ? 2 ** (2 * part - 1) : kind === 'sigmas' ? 16 * part - 8 : null;
      context.fillStyle = value === null ? css(this.scale.at(part)) : css(this.scale.colour(value));
      context.fillRect(x, 0, 1, 10);
    }
    const entry = (colour, text) => element('span', { class: 'entry' }, element('i', { style: `background:${css(colour)}` }), text);
    const has = (values, test) => values.some(test);
    place.replaceChildren(
      element('span', { class: 'entry' }, ends[0], ramp, ends[2], kind === 'value' ? ` ${ends[1]}` : ` (middle: ${ends[1]})`),
      has(this.map.value, Number.isNaN) || has(this.map.usual, Number.isNaN) ? entry(missing(), 'no value, or too early to know what is usual') : '',
      has(this.map.lost, Boolean) || has(this.map.high, (x) => x === Infinity) ? entry(LOST, 'NaN or infinite') : '',
      this.watched ? element('span', { class: 'entry' }, element('i', { class: 'hatched' }), 'not compared with its past yet') : '',
      kind !== 'value' && !has(this.map.usual, (x) => x > 0) && has(this.map.value, Number.isFinite) ? element('span', { class: 'entry' }, element('b', {}, 'No usual value is known here (too early, or the values are not positive): choose the colour \u201cvalue\u201d.')) : '',
      this.store.isEarly ? element('span', { class: 'entry' }, `The first ${this.store.overview.learnt} steps show values; then it is known what is usual.`) : '',
      hidden ? element('span', { class: 'entry' }, `All names begin with ${shortName(this.map.layers[0].slice(0, hidden))}`) : '',
      this.map.faded.some((step) => step !== null) ? element('span', { class: 'entry' }, element('i', { class: 'hatched faded' }), 'no LayerNorm any more: it is switched') : '',
    );
  }
}
