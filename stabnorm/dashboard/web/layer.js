// The card of one layer: its statistic with what is usual, all its statistics at the pinned step, and its company.
import { Axis } from './axis.js';
import { FIRST } from './controls.js';
import { counted, element, everyText, number, sharp, stepText, ticks, unitText, visible } from './dom.js';
import { LOST, css, runColour, scaleOf, themeColours } from './colours.js';
import { decades, drawLine } from './timeline.js';

const WIDTH = 300;
const LEFT = 54;

/** Makes a vertical axis for positive values, logarithmic where they differ much. */
function verticalAxis(values, top, bottom) {
  const finite = values.filter(Number.isFinite);
  if (!finite.length) return null;
  let low = finite.reduce((a, b) => Math.min(a, b)), high = finite.reduce((a, b) => Math.max(a, b));
  const logarithmic = low > 0 && high > 20 * low;
  if (low === high) [low, high] = [low - Math.abs(low) / 10 - 1e-12, high + Math.abs(high) / 10 + 1e-12];
  const of = (x) => (logarithmic ? Math.log(x) : x);
  return { low, high, logarithmic, y: (x) => bottom - (of(x) - of(low)) / (of(high) - of(low)) * (bottom - top) };
}

/** Draws the two ends of a vertical axis, and lines at round numbers between them. */
function scale(context, axis, colours, top, bottom) {
  context.fillStyle = colours.faint;
  context.strokeStyle = colours.line;
  context.textAlign = 'right';
  context.textBaseline = 'top';
  context.fillText(number(axis.high), LEFT - 4, top - 2);
  context.textBaseline = 'bottom';
  context.fillText(number(axis.low), LEFT - 4, bottom + 2);
  context.textBaseline = 'middle';
  const between = axis.logarithmic ? decades([axis.low, axis.high]) : ticks(axis.low, axis.high, 3);
  let last = bottom;
  for (const tick of between) {
    const y = axis.y(tick);
    if (y < top + 16 || y > last - 14) continue;
    last = y;
    context.beginPath();
    context.moveTo(LEFT, y);
    context.lineTo(WIDTH - 8, y);
    context.stroke();
    context.fillText(number(tick), LEFT - 4, y);
  }
}

function drawBand(canvas, answer, store) {
  const height = 130, bottom = height - 20;
  const context = sharp(canvas, WIDTH, height);
  const colours = themeColours();
  const { band, edges } = answer;
  const steps = new Axis(LEFT, WIDTH - LEFT - 8, edges[0], edges[edges.length - 1]);
  const spread = [...band.low, ...band.high, ...(store.hasPast ? band.usual : [])];
  const vertical = verticalAxis(spread, 6, bottom);
  if (!vertical) return;
  const x = (i) => steps.x((edges[i] + edges[i + 1]) / 2);
  scale(context, vertical, colours, 6, bottom);
  context.save();
  context.beginPath();
  context.rect(LEFT, 0, WIDTH - LEFT - 8, bottom);
  context.clip();
  context.fillStyle = colours.band;
  if (store.hasPast) [...band.under].forEach((under, i) => {
    const above = vertical.y(band.over[i]), below = vertical.y(under);
    if (Number.isFinite(above + below)) context.fillRect(steps.x(edges[i]), above, (WIDTH - LEFT) / band.under.length + 1, below - above);
  });
  context.strokeStyle = colours.accent;
  drawLine(context, [...band.low], x, vertical.y);
  drawLine(context, [...band.high], x, vertical.y);
  const bound = store.definition(store.state.statistic).threshold;
  if (bound !== null && bound !== undefined) {
    context.strokeStyle = colours.alert;
    context.setLineDash([2, 4]);
    drawLine(context, [bound, bound], (i) => (i ? WIDTH : LEFT), vertical.y);
    context.setLineDash([]);
  }
  context.restore();
  for (const onset of store.run.onsets) steps.mark(context, onset.step, 4, bottom, colours.alert);
  steps.mark(context, answer.step, 4, bottom, colours.accent, [2, 2]);
  steps.draw(context, bottom);
}

function drawProfile(canvas, answer, layers, layer) {
  const height = 100, bottom = height - 18;
  const context = sharp(canvas, WIDTH, height);
  const colours = themeColours();
  const { value, usual } = answer.profile;
  const vertical = verticalAxis([...value, ...usual], 6, bottom);
  if (!vertical) return;
  const x = (i) => LEFT + (i + 0.5) / value.length * (WIDTH - LEFT - 8);
  scale(context, vertical, colours, 6, bottom);
  context.textBaseline = 'top';
  context.textAlign = 'left';
  context.fillText(value.length > 1 ? 'first' : '', LEFT, bottom + 4);
  context.textAlign = 'right';
  context.fillText(value.length > 1 ? 'last' : '', WIDTH - 8, bottom + 4);
  context.strokeStyle = colours.faint;
  context.setLineDash([3, 3]);
  drawLine(context, [...usual], x, vertical.y);
  context.setLineDash([]);
  context.strokeStyle = colours.accent;
  drawLine(context, [...value], x, vertical.y);
  const at = layers.indexOf(layer);
  context.fillStyle = colours.alert;
  context.beginPath();
  context.arc(x(at), vertical.y(value[at]), 4, 0, 7);
  context.fill();
}

function drawOthers(canvas, answer, store) {
  const height = 100, bottom = height - 18;
  const context = sharp(canvas, WIDTH, height);
  const colours = themeColours();
  const all = [[store.state.run, answer.band.high], ...Object.entries(answer.others)];
  const vertical = verticalAxis(all.flatMap(([, values]) => [...values]), 6, bottom);
  if (!vertical) return [];
  const { edges } = answer;
  const steps = new Axis(LEFT, WIDTH - LEFT - 8, edges[0], edges[edges.length - 1]);
  const names = store.overview.runs.map(({ name }) => name);
  scale(context, vertical, colours, 6, bottom);
  all.forEach(([name, values]) => {
    context.strokeStyle = runColour(name, names);
    drawLine(context, [...values], (i) => steps.x((edges[i] + edges[i + 1]) / 2), vertical.y);
  });
  steps.draw(context, bottom);
  return all.map(([name]) => element('span', { class: 'entry' }, element('i', { style: `background:${runColour(name, names)}` }), visible(name)));
}

function drawChannels(canvas, answer) {
  const { ids, values } = answer.channels;
  const columns = answer.edges.length - 1, rowHeight = 12;
  const context = sharp(canvas, WIDTH, ids.length * rowHeight + 22);
  const finite = values.filter(Number.isFinite);
  const high = finite.reduce((a, b) => Math.max(a, b), 0), least = finite.reduce((a, b) => (b > 0 ? Math.min(a, b) : a), high);
  const magnitudes = scaleOf('value', { low: 0, high, least });
  const colours = themeColours();
  context.textAlign = 'right';
  context.textBaseline = 'middle';
  ids.forEach((id, row) => {
    context.fillStyle = colours.faint;
    context.fillText(String(id), LEFT - 4, (row + 0.5) * rowHeight + 2);
    for (let column = 0; column < columns; column++) {
      const value = values[column * ids.length + row];
      if (Number.isNaN(value)) continue;
      context.fillStyle = css(Number.isFinite(value) ? magnitudes.colour(value) : LOST);
      context.fillRect(LEFT + column / columns * (WIDTH - LEFT - 8), row * rowHeight + 2, (WIDTH - LEFT - 8) / columns + 0.6, rowHeight - 1);
    }
  });
  const { edges } = answer;
  new Axis(LEFT, WIDTH - LEFT - 8, edges[0], edges[edges.length - 1]).draw(context, ids.length * rowHeight + 2);
  return `A row is a channel, with its number. Dark: ${number(least)}, bright: ${number(high)}; empty: others were larger.`;
}

/** Whether a value lies beyond a bound of the catalogue, or outside the layer's usual range. */
function stands({ statistic, value, sigmas }, store) {
  const { threshold, least, floor } = store.definition(statistic);
  const given = (bound) => bound !== null && bound !== undefined;
  if ((given(threshold) && Number(value) > threshold) || (given(least) && Number(value) < least)) return 'bad';
  return given(floor) && Math.abs(Number(sigmas)) > store.overview.bound ? 'far' : '';
}

function table(measures, store) {
  const row = (measure) => {
    const { statistic, value, usual } = measure;
    const definition = store.definition(statistic);
    const x = Number(value), known = Number(usual);
    const title = [statistic, definition.formula, everyText(measure.every).trim(), definition.bad_when && `Bad when: ${definition.bad_when}.`, definition.advice].filter(Boolean).join('\n');
    return element('tr', { class: stands(measure, store), title, data: { statistic } },
      element('td', {}, definition.plain, definition.plain === statistic ? '' : element('small', {}, ` ${statistic}`)),
      element('td', {}, number(value)), element('td', {}, Number.isNaN(known) ? '' : number(known)),
      element('td', {}, Number.isNaN(known) || Number.isNaN(x) ? '' : `\u00d7${number(x / known)}`));
  };
  return element('table', { class: 'measures' },
    element('thead', {}, element('tr', {}, ...['measure', 'value', 'usual', '\u00d7'].map((text) => element('th', {}, text)))),
    element('tbody', {}, ...measures.map(row)));
}

/** The measures that a reader looks at first, and all others behind a fold. */
function tables(answer, store) {
  const first = ({ statistic, ...rest }) => FIRST.includes(statistic) || statistic === store.state.statistic || stands({ statistic, ...rest }, store);
  const rest = answer.table.filter((measure) => !first(measure));
  const open = document.querySelector('#all-measures[open]') !== null;
  const order = ({ statistic }) => (FIRST.includes(statistic) ? FIRST.indexOf(statistic) : FIRST.length);
  return [table(answer.table.filter(first).sort((a, b) => order(a) - order(b)), store),
    rest.length ? element('details', { id: 'all-measures', open }, element('summary', {}, counted(rest.length, 'more measure')), table(rest, store)) : ''];
}

/**
 * Draws the card.
 * @param {HTMLElement} place
 * @param {import('./state.js').Store} store
 * @param {Object} answer - the answer to `layer`.
 */
export function drawLayer(place, store, answer) {
  const { layers } = store.part;
  const { plain: lower, unit } = store.definition(store.state.statistic);
  const plain = lower[0].toUpperCase() + lower.slice(1);
  const shown = answer.table.find(({ statistic }) => statistic === store.state.statistic);
  const about = [
    `${plain}${unitText(unit)}${everyText(shown && shown.every)}.`,
    store.hasPast && !store.isEarly ? `Grey: its usual range (\u00b1 ${store.overview.bound} robust \u03c3).` : '',
  ].filter(Boolean).join(' ');
  const canvas = () => element('canvas', { role: 'img' });
  const [band, profile, others, channels] = [canvas(), canvas(), canvas(), canvas()];
  drawBand(band, answer, store);
  drawProfile(profile, answer, layers, answer.layer);
  const legend = drawOthers(others, answer, store);
  const withChannels = answer.channels && answer.channels.ids.length;
  const aboutChannels = withChannels ? drawChannels(channels, answer) : '';
  place.replaceChildren(
    element('h2', { class: 'layer-name' }, visible(answer.layer), ' ', element('small', {}, `${layers.indexOf(answer.layer) + 1} of ${layers.length} in depth`)),
    element('p', { class: 'faint' }, about), band,
    element('h2', {}, `At step ${stepText(answer.step)}`), ...tables(answer, store),
    ...(layers.length > 1 ? [element('h2', {}, `${plain} from the first to the last ${store.state.companion ? 'row' : 'layer'}`),
      element('p', { class: 'faint' }, store.isEarly || !store.hasPast ? `At step ${stepText(answer.step)}.` : `Line: at step ${stepText(answer.step)}. Dashed: what was usual.`), profile] : []),
    ...(Object.keys(answer.others).length ? [element('h2', {}, 'The same layer in all runs'), others, element('div', { class: 'legend' }, ...legend)] : []),
    ...(withChannels ? [element('h2', {}, 'Channels with the largest inputs'), element('p', { class: 'faint' }, aboutChannels), channels] : []),
  );
}
