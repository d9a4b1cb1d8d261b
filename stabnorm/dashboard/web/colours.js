// The colours of the maps, readable without seeing red and green, in a light and in a dark theme.

import { number } from './dom.js';

const DIVERGING = {
  light: [[33, 102, 172], [146, 197, 222], [247, 247, 247], [244, 165, 130], [178, 24, 43]],
  dark: [[120, 190, 255], [62, 106, 150], [40, 43, 48], [158, 74, 58], [255, 120, 96]],
};
const SEQUENTIAL = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];
export const LOST = [225, 0, 215]; // NaN and infinity
const MISSING = { light: [214, 216, 219], dark: [72, 76, 82] };

/**
 * Reads the colours of the page's theme.
 * @returns {Object} by name: text, faint, line, panel, alert, accent.
 */
export function themeColours() {
  const style = getComputedStyle(document.documentElement);
  const of = (name) => style.getPropertyValue(`--${name}`).trim();
  return Object.fromEntries(['text', 'faint', 'line', 'panel', 'alert', 'accent', 'band'].map((name) => [name, of(name)]));
}

const isDark = () => document.documentElement.dataset.theme === 'dark';

function between(colours, position) {
  const place = Math.min(Math.max(position, 0), 1) * (colours.length - 1);
  const left = Math.min(Math.floor(place), colours.length - 2);
  return colours[left].map((channel, i) => Math.round(channel + (place - left) * (colours[left + 1][i] - channel)));
}

/** The colour where there is no value. */
export function missing() {
  return isDark() ? MISSING.dark : MISSING.light;
}

/**
 * How values become colours.
 * @param {'times'|'value'|'sigmas'} kind
 * @param {{low: number, high: number, least: number}} range - over all runs, for `value`.
 * @returns {{colour: function(number): number[], ends: string[], kind: string, rank: function(number): number}}
 *   `colour` takes what a cell shows, `rank` says how far it is from calm, `at` (values only) is a part of the ramp.
 */
export function scaleOf(kind, range) {
  const diverging = isDark() ? DIVERGING.dark : DIVERGING.light;
  if (kind === 'times') {
    return { kind, colour: (x) => between(diverging, (Math.log2(x) + 1) / 2), ends: ['÷2 or less', 'usual', '×2 or more'],
      rank: (x) => Math.abs(Math.log2(x)) };
  }
  if (kind === 'sigmas') {
    return { kind, colour: (x) => between(diverging, (x + 8) / 16), ends: ['-8 σ', 'usual', '8 σ'], rank: Math.abs };
  }
  const logarithmic = range.low >= 0 && range.high > 100 * range.least;
  const of = (x) => (logarithmic ? Math.log(Math.max(x, range.least)) : x);
  const low = of(logarithmic ? range.least : range.low), high = of(range.high);
  return {
    kind, colour: (x) => between(SEQUENTIAL, high > low ? (of(x) - low) / (high - low) : 0.5), rank: (x) => x,
    at: (part) => between(SEQUENTIAL, part),
    ends: [number(logarithmic ? range.least : range.low), logarithmic ? '(logarithmic)' : '', number(range.high)],
  };
}

/** A colour as CSS writes it. */
export const css = (colour) => `rgb(${colour.join(',')})`;

/** Colours of several runs in one chart; they differ in lightness as well. */
export const RUNS = ['#0072b2', '#e69f00', '#009e73', '#cc79a7', '#56b4e9', '#d55e00', '#999999'];

/** The colour of a run, which stays the same whichever run is looked at. */
export const runColour = (name, names) => RUNS[[...names].sort().indexOf(name) % RUNS.length];
