// The switch from LayerNorm to BatchNorm: lam by layer and step, the gate's decisions, and where each norm was folded.
import { Axis, RIGHT } from './axis.js';
import { element, fitted, number, sharp, stepText, visible } from './dom.js';
import { css, missing, scaleOf, themeColours } from './colours.js';

/**
 * Draws the panel, or nothing for a run without a switch.
 * @param {HTMLElement} place
 * @param {import('./state.js').Store} store
 * @param {Object} answer - the answer to `switch`.
 * @param {{left: number, width: number}} plot
 */
export function drawSwitch(place, store, answer, { left, width }) {
  place.hidden = !answer.lam && !answer.folds;
  if (place.hidden) return;
  const canvas = element('canvas', { role: 'img', 'aria-label': 'lam by layer and step' });
  const { layers, edges, lam } = answer;
  const shown = layers.map((_, i) => i).filter((i) => lam.some((value, at) => at % layers.length === i && !Number.isNaN(value)));
  const rowHeight = Math.min(16, Math.max(5, Math.floor(220 / Math.max(1, shown.length))));
  const context = sharp(canvas, left + width + RIGHT, shown.length * rowHeight + 22);
  const axis = new Axis(left, width, edges[0], edges[edges.length - 1]);
  const scale = scaleOf('value', { low: 0, high: 1, least: 0.01 });
  const colours = themeColours();
  const linear = (value) => scale.at(value);
  context.textAlign = 'right';
  context.textBaseline = 'middle';
  shown.forEach((layer, row) => {
    for (let column = 0; column < edges.length - 1; column++) {
      const value = lam[column * layers.length + layer];
      context.fillStyle = css(Number.isNaN(value) ? missing() : linear(value));
      context.fillRect(axis.x(edges[column]), row * rowHeight, axis.width / (edges.length - 1) + 0.6, rowHeight - 1);
    }
    context.fillStyle = colours.text;
    if (row % Math.ceil(11 / rowHeight) === 0) context.fillText(fitted(context, layers[layer], left - 10), left - 6, (row + 0.5) * rowHeight);
  });
  axis.draw(context, shown.length * rowHeight);
  const last = (values, layer) => {
    for (let at = values.length - layers.length + layer; at >= 0; at -= layers.length) if (!Number.isNaN(values[at])) return values[at];
    return NaN;
  };
  const gate = new Map();
  for (const decision of answer.gate) gate.set(decision.layer, decision);
  const folds = new Map((answer.folds ? answer.folds.norms : []).map((norm) => [norm.name, norm]));
  const names = shown.length ? shown.map((i) => layers[i]) : [...folds.keys()];
  const rows = names.map((name) => {
    const index = layers.indexOf(name), decision = gate.get(name), fold = folds.get(name);
    const residual = answer.residual ? last(answer.residual, index) : NaN;
    return element('tr', { class: residual > 0.5 ? 'bad' : residual > 0.3 ? 'far' : '' },
      element('td', {}, visible(name)), element('td', {}, index < 0 ? '' : number(last(lam, index))),
      element('td', {}, Number.isNaN(residual) ? '' : number(residual)),
      element('td', {}, decision ? `${decision.state} since step ${stepText(decision.at)}: ${visible(decision.reason)}` : ''),
      element('td', {}, fold ? `${fold.status}${fold.into ? ` \u2192 ${visible(fold.into)}` : ''}${fold.reason ? `: ${visible(fold.reason)}` : ''}` : ''));
  });
  const head = ['norm', 'lam', 'affine residual', 'decision', 'fold'];
  place.replaceChildren(
    element('h2', {}, 'Switch ', element('small', {}, 'from LayerNorm (yellow: its share, lam, is 1) to BatchNorm (dark: 0)')),
    canvas,
    element('details', {}, element('summary', {}, 'Each norm: how far it is, why it waits, and where it was folded'),
      element('p', { class: 'faint' }, 'The affine residual says how much of its LayerNorm a norm would lose: below 0.3 it may switch, above 0.5 it waits.'), element('div', { class: 'scroll' }, element('table', { class: 'measures' },
      element('thead', {}, element('tr', {}, ...head.map((text) => element('th', {}, text)))), element('tbody', {}, ...rows)))),
  );
}
