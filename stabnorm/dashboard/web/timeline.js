// The loss over the steps, with learning rate and validation, and the alerts as lines.
import { Axis, RIGHT } from './axis.js';
import { element, number, sharp, stepText, writeOn } from './dom.js';
import { LOST, RUNS, css, themeColours } from './colours.js';

const HEIGHT = 112;
const BOTTOM = 20;

/** Ends of a logarithmic axis that hold all positive values. */
function logarithmicEnds(...arrays) {
  let low = Infinity, high = -Infinity;
  for (const array of arrays) {
    for (const value of array) {
      if (value > 0 && Number.isFinite(value)) {
        low = Math.min(low, value);
        high = Math.max(high, value);
      }
    }
  }
  if (!(high > 0)) return null;
  return low === high ? [low / 2, high * 2] : [low, high];
}

/** Picks the powers of ten between two ends, or rounder numbers where there are few. */
export function decades([low, high]) {
  const all = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++) {
    for (const digit of [1, 2, 5]) all.push(digit * 10 ** power);
  }
  const inside = all.filter((value) => value >= low && value <= high);
  const tens = inside.filter((value) => Number.isInteger(Math.round(Math.log10(value) * 1e6) / 1e6));
  return tens.length >= 2 ? tens.slice(0, 6) : inside.slice(0, 4);
}

/** A line through values, broken where there is none. */
export function drawLine(context, values, x, y) {
  context.beginPath();
  let down = false;
  values.forEach((value, i) => {
    const at = y(value);
    if (!Number.isFinite(at)) { down = false; return; }
    if (down) context.lineTo(x(i), at);
    else context.moveTo(x(i), at);
    down = true;
  });
  context.stroke();
}

/**
 * Draws the timeline.
 * @param {HTMLCanvasElement} canvas
 * @param {HTMLElement} legend
 * @param {import('./state.js').Store} store
 * @param {Object} lines - the answer to `lines`.
 * @param {{left: number, width: number, first: number, end: number}} plot - where the map has its columns, and which.
 * @returns {Axis}
 */
export function drawTimeline(canvas, legend, store, lines, { left, width, first, end }) {
  const context = sharp(canvas, left + width + RIGHT, HEIGHT);
  const colours = themeColours();
  const axis = new Axis(left, width, first, end);
  const plotBottom = HEIGHT - BOTTOM;
  const x = (i) => axis.x((lines.edges[i] + lines.edges[i + 1]) / 2);
  const entries = [];
  const ends = lines.loss && logarithmicEnds(lines.loss.low, lines.loss.high);
  if (ends) {
    const y = (value) => (value > 0 && Number.isFinite(value)
      ? plotBottom - 4 - Math.log(value / ends[0]) / Math.log(ends[1] / ends[0]) * (plotBottom - 16) : NaN);
    context.textAlign = 'right';
    context.textBaseline = 'middle';
    for (const tick of decades(ends)) {
      context.strokeStyle = colours.line;
      context.fillStyle = colours.faint;
      context.beginPath();
      context.moveTo(left, y(tick));
      context.lineTo(left + width, y(tick));
      context.stroke();
      context.fillText(number(tick), left - 6, y(tick));
    }
    context.fillStyle = colours.band;
    lines.loss.low.forEach((low, i) => {
      const top = y(lines.loss.high[i]), bottom = y(low);
      if (Number.isFinite(top + bottom)) context.fillRect(axis.x(lines.edges[i]), top, Math.max(1, width / lines.loss.low.length), Math.max(1, bottom - top));
    });
    context.strokeStyle = colours.text;
    drawLine(context, lines.loss.mean, x, y);
    entries.push(['loss', colours.text]);
    context.fillStyle = css(LOST);
    lines.loss.high.forEach((high, i) => {
      if (high === Infinity) context.fillRect(axis.x(lines.edges[i]), plotBottom - 5, 3, 5);
    });
    if (lines.lost !== null && lines.lost < end) {
      const from = axis.x(Math.max(lines.lost, first));
      context.fillRect(from, plotBottom - 5, left + width - from, 5);
    }
    if (lines.lost !== null || lines.loss.high.includes(Infinity)) entries.push(['the loss is NaN or infinite', css(LOST)]);
  } else {
    context.fillStyle = colours.faint;
    context.textAlign = 'left';
    context.fillText('The record has no loss.', left + 8, 30);
  }
  if (lines.learning_rate) {
    const high = Math.max(...[...lines.learning_rate.high].filter(Number.isFinite), 0);
    context.strokeStyle = RUNS[4];
    context.setLineDash([4, 3]);
    if (high > 0) {
      drawLine(context, lines.learning_rate.mean, x, (value) => plotBottom - 2 - value / high * (plotBottom - 16));
      entries.push([`learning rate (up to ${number(high)})`, RUNS[4]]);
    }
    context.setLineDash([]);
  }
  Object.entries(lines.validation || {}).slice(0, 3).forEach(([tag, points], index) => {
    const values = points.map(([, value]) => Number(value)).filter(Number.isFinite);
    if (!values.length) return;
    const low = Math.min(...values), high = Math.max(...values);
    context.fillStyle = RUNS[1 + index];
    for (const [step, value] of points) {
      if (Number.isFinite(Number(value))) {
        context.beginPath();
        context.arc(axis.x(step), plotBottom - 6 - (high > low ? (value - low) / (high - low) : 0.5) * (plotBottom - 20), 2.5, 0, 7);
        context.fill();
      }
    }
    entries.push([`${tag} (${number(low)} to ${number(high)})`, RUNS[1 + index]]);
  });
  drawMarks(context, axis, store, 0, plotBottom, true);
  axis.draw(context, plotBottom);
  legend.replaceChildren(...entries.map(([text, colour]) => element('span', { class: 'entry' },
    element('i', { style: `background:${colour}` }), text)));
  return axis;
}

/** Draws lines for the alerts, the step at which alerts begin, and the pinned step. */
export function drawMarks(context, axis, store, top, bottom, named) {
  const colours = themeColours();
  const run = store.run;
  context.textBaseline = 'top';
  const begin = run.steps[0] + store.overview.armed;
  axis.mark(context, begin, top, bottom, colours.faint, [1, 3]);
  if (named && begin > axis.first && begin < axis.end) {
    context.textAlign = axis.x(begin) > axis.left + axis.width / 2 ? 'right' : 'left';
    writeOn(context, ' comparison with the past begins ', axis.x(begin), bottom - 14, colours.faint, colours.panel);
  }
  let written = -Infinity; // up to here there is a label
  for (const onset of run.onsets) {
    axis.mark(context, onset.step, top, bottom, colours.alert);
    if (named && onset.step >= axis.first && onset.step < axis.end) {
      const text = ` alert ${stepText(onset.step)} `, x = axis.x(onset.step + 0.5), { width } = context.measureText(text);
      const before = x - width >= Math.max(written, 0);
      if (before || (x >= written && x + width < axis.left + axis.width)) {
        context.textAlign = before ? 'right' : 'left';
        writeOn(context, text, x, top + 1, colours.alert, colours.panel);
        written = before ? x : x + width;
      }
    }
    if (onset.lead !== null && onset.lead > 0) {
      const doubled = onset.step + onset.lead;
      axis.mark(context, doubled, top, bottom, colours.text, [3, 3]);
      if (named && doubled >= axis.first && doubled < axis.end) {
        const text = ` loss doubled ${stepText(doubled)} `, x = axis.x(doubled + 0.5), { width } = context.measureText(text);
        if (x >= written) {
          const fits = x + width < axis.left + axis.width;
          context.textAlign = fits ? 'left' : 'right';
          writeOn(context, text, x, top + 1, colours.text, colours.panel);
          written = fits ? x + width : x;
        }
      }
    }
  }
  if (store.state.step !== null) axis.mark(context, store.state.step, top, bottom, colours.accent, [2, 2]);
}
