// The cards at the top, a run each, and the list of alerts at the left.
import { counted, element, shortName, stepText, visible } from './dom.js';

const MARKS = { 'not finite': '\u2716', unstable: '\u25cf', 'too early': '\u2026', switching: '\u2026', switched: '\u2713', healthy: '\u2713' };

const MANY = 6; // cards; of more, only the chosen one shows its sentences

/**
 * Draws a card for each run, worst first.
 * @param {HTMLElement} place
 * @param {import('./state.js').Store} store
 */
export function drawVerdicts(place, store) {
  const cards = store.overview.runs.map((run) => {
    const chosen = run.name === store.state.run;
    return element('button', {
      class: `card verdict severity-${run.severity}${chosen ? ' chosen' : ''}`, type: 'button', 'aria-pressed': chosen,
      data: { run: run.name },
      on: {
        click: () => {
          Object.assign(store.state, { run: run.name, companion: '', first: null, last: null, step: null });
          store.lookAt(run.onsets[0]);
          store.set({});
        },
      },
    },
    element('strong', {}, `${MARKS[run.state] || ''} ${visible(run.name)} \u2014 ${run.state}`),
    element('span', { class: 'title' }, visible(run.title)),
    ...run.lines.map((line) => element('span', { class: 'line' }, visible(line))),
    ...run.notes.map((note) => element('span', { class: 'line note' }, `Note: ${visible(note)}`)));
  });
  place.classList.toggle('many', cards.length > MANY);
  const before = place.querySelector('.chosen');
  place.replaceChildren(...cards);
  const chosen = place.querySelector('.chosen');
  if (chosen && (!before || before.dataset.run !== chosen.dataset.run)) {
    place.scrollTop = Math.max(0, chosen.offsetTop - place.offsetTop + chosen.offsetHeight - place.clientHeight + 8);
  }
}

/**
 * Lists the onsets of the run, with one advice and one remedy each.
 * @param {HTMLElement} place
 * @param {import('./state.js').Store} store
 */
export function drawAlerts(place, store) {
  const run = store.run;
  const onsets = run ? run.onsets : [];
  const heading = element('h2', {}, 'Alerts ', element('small', {}, onsets.length ? '(n / p: next, previous)' : ''));
  if (!onsets.length) {
    place.replaceChildren(heading, element('p', { class: 'faint' }, 'No alert was raised.'));
    return;
  }
  const list = onsets.map((onset, index) => {
    const chosen = onset.step === store.state.step;
    const more = onset.alerts.length - 1;
    const button = element('button', {
      class: `alert ${onset.kind}${chosen ? ' chosen' : ''}`, type: 'button', data: { step: onset.step, index },
      on: { click: () => { store.lookAt(onset); store.set({}); } },
    },
    element('strong', {}, `step ${stepText(onset.step)}`), ` \u00b7 ${shortName(onset.layer)}`,
    element('span', { class: 'line' }, visible(onset.sentence)),
    more > 0 ? element('span', { class: 'line faint' }, `${counted(more, 'more alert')} up to step ${stepText(onset.last_step)}`) : null);
    const advice = element('div', { class: 'advice' },
      element('p', {}, element('b', {}, 'Where to look: '), visible(onset.advice)),
      element('p', {}, element('b', {}, 'What to try: '), visible(onset.remedy)));
    return [button, chosen || onsets.length === 1 ? advice : ''];
  });
  place.replaceChildren(heading, ...list.flat());
}

/**
 * Moves to the next or the previous onset.
 * @param {import('./state.js').Store} store
 * @param {1|-1} direction
 */
export function stepThroughAlerts(store, direction) {
  const onsets = store.run ? store.run.onsets : [];
  if (!onsets.length) return;
  const at = store.state.step ?? -1;
  const next = direction > 0 ? onsets.find(({ step }) => step > at) || onsets[0]
    : [...onsets].reverse().find(({ step }) => step < at) || onsets[onsets.length - 1];
  store.lookAt(next);
  store.set({});
}
