// Which statistic is shown, in which colours, and which rows.
import { element } from './dom.js';

// The statistics that are offered first; the others are in the list beside them.
export const FIRST = ['token_std_mean', 'amax', 'crest', 'grad_gain', 'affine_residual', 'lam'];

function choice(label, options, chosen, choose) {
  return element('div', { class: 'choice', role: 'group', 'aria-label': label },
    ...options.map(([value, text, title]) => element('button', {
      type: 'button', class: value === chosen ? 'on' : '', 'aria-pressed': value === chosen, title, data: { value },
      on: { click: () => choose(value) },
    }, text)));
}

/**
 * Draws the controls.
 * @param {HTMLElement} place
 * @param {import('./state.js').Store} store
 */
export function drawControls(place, store) {
  const { state, run, part } = store;
  if (!run || !part) {
    place.replaceChildren();
    return;
  }
  const parts = run.parts.map(({ companion }) => [companion, companion || 'norms']);
  const first = FIRST.filter((name) => part.statistics.includes(name));
  const shown = first.length ? first : part.statistics.slice(0, 4);
  const plain = (name) => store.definition(name).plain;
  const all = element('select', {
    'aria-label': 'all statistics', on: { change: (event) => store.set({ statistic: event.target.value }) },
  }, ...part.statistics.map((name) => element('option', { value: name, selected: name === state.statistic },
    plain(name) === name ? name : `${plain(name)} (${name})`)));
  const about = store.definition(state.statistic);
  const filter = element('input', {
    type: 'search', placeholder: 'filter by name  ( / )', value: state.filter, id: 'filter', 'aria-label': 'filter rows by name',
    on: { input: (event) => store.set({ filter: event.target.value }) },
  });
  const hadFocus = document.activeElement && document.activeElement.id === 'filter';
  place.replaceChildren(
    parts.length > 1 ? element('h2', {}, 'Rows of') : '',
    parts.length > 1 ? choice('rows of', parts, state.companion, (companion) => {
      state.companion = companion;
      Object.assign(state, { statistic: store.usualStatistic(), layer: store.part.layers[0], open: new Set() });
      store.set({});
    }) : '',
    element('h2', {}, 'Measure'),
    choice('statistic', shown.map((name) => [name, plain(name), name]), state.statistic, (statistic) => store.set({ statistic })),
    all,
    element('p', { class: 'faint definition' }, element('code', {}, state.statistic),
      about.formula ? `: ${about.formula}.` : '', about.bad_when ? ` ${/^alert: /.test(about.bad_when) ? 'Alert when: ' : 'Bad when: '}${about.bad_when.replace(/^alert: /, '')}.` : ''),
    element('h2', {}, 'Colour'),
    choice('colour', [['times', '\u00d7 usual', 'the value divided by the layer\u2019s usual value'], ['value', 'value', 'the value itself'],
      ['sigmas', '\u03c3', 'how many robust standard deviations the value is off the layer\u2019s usual one']], store.colour, (colour) => store.set({ colour })),
    element('h2', {}, 'Rows'),
    choice('order', [['depth', 'depth'], ['worst', 'worst first']], state.order, (order) => store.set({ order })),
    filter,
  );
  if (hadFocus) {
    filter.focus();
    filter.setSelectionRange(filter.value.length, filter.value.length);
  }
}
