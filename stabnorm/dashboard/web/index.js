// The page: builds the panels, and draws them again when the reader or the run moves.
import { zoomable } from './axis.js';
import { drawControls } from './controls.js';
import { element, everyText, unitText, visible } from './dom.js';
import { savePicture, saveTable } from './export.js';
import { HeatMap, leftOf } from './heat.js';
import { followTheme, onReload, readAddress, writeAddress } from './host.js';
import { drawLayer } from './layer.js';
import { ReportSource, ServerSource } from './source.js';
import { Store } from './state.js';
import { drawSwitch } from './switch.js';
import { drawTimeline } from './timeline.js';
import { drawAlerts, drawVerdicts, stepThroughAlerts } from './verdicts.js';

const EVERY = 5000; // ms between two looks for new steps

/** Builds the empty panels. */
function build() {
  const panel = (name, ...children) => element('section', { class: `card ${name}`, id: name }, ...children);
  const canvas = (id) => element('canvas', { id, role: 'img', tabindex: 0 });
  const button = (id, text) => element('button', { id, type: 'button', class: 'small' }, text);
  const parts = {
    message: element('p', { id: 'message', role: 'status' }),
    verdicts: element('div', { id: 'verdicts' }),
    alerts: panel('alerts'),
    controls: panel('controls'),
    timeline: canvas('timeline'),
    lineLegend: element('div', { class: 'legend' }),
    heading: element('h2', { id: 'heading' }),
    map: canvas('map'),
    mapLegend: element('div', { class: 'legend' }),
    hover: element('p', { id: 'hover', 'aria-live': 'polite' }, 'Point at a cell to read it; click to pin it.'),
    layer: panel('layer'),
    switch: panel('switch'),
    whole: button('whole', 'whole run'),
    png: button('png', 'PNG'),
    csv: button('csv', 'CSV'),
  };
  document.body.append(
    parts.message, parts.verdicts,
    element('main', {},
      element('div', { class: 'left' }, parts.alerts, parts.controls),
      element('div', { class: 'middle' },
        panel('pictures',
          element('h2', {}, 'Loss ', element('small', {}, 'drag to zoom, double-click for the whole run, click to pin a step'),
            element('span', { class: 'tools' }, parts.whole, parts.png, parts.csv)),
          element('div', { class: 'stack' }, parts.timeline), parts.lineLegend, parts.heading,
          element('div', { class: 'stack' }, parts.map), parts.mapLegend, parts.hover),
        parts.switch),
      element('div', { class: 'right' }, parts.layer)),
  );
  return parts;
}

/** The page and its answers. */
class Page {
  constructor(source) {
    this.source = source;
    this.store = new Store(readAddress());
    this.parts = build();
    this.turn = 0;
    this.store.listen(() => this.draw());
    this.listen();
  }

  listen() {
    const { parts, store } = this;
    zoomable(parts.timeline, store, () => this.axis, (step) => store.set({ step }));
    zoomable(parts.map, store, () => this.axis, (step, event) => {
      const under = this.heat && this.heat.under(event);
      if (under && under.layer) store.set({ step: under.step, layer: under.layer });
    });
    parts.map.addEventListener('click', (event) => {
      const under = this.heat && this.heat.under(event);
      if (!under || under.layer) return;
      const { block, layers } = under.row;
      if (block) {
        const open = new Set(store.state.open);
        if (layers.length === 1) open.delete(block);
        else open.add(block);
        store.set({ open });
      } else store.set({ layer: this.heat.map.layers[layers[0]] });
    });
    parts.map.addEventListener('pointermove', (event) => {
      const under = this.heat && this.heat.under(event);
      parts.hover.textContent = under && under.layer ? this.heat.describe(under) : under ? visible(under.row.name) : '\u00a0';
    });
    parts.whole.addEventListener('click', () => store.set({ first: null, last: null }));
    parts.png.addEventListener('click', () => savePicture([parts.timeline, parts.map], store));
    parts.csv.addEventListener('click', () => saveTable(this.heat.map, store, this.source));
    window.addEventListener('resize', () => this.draw());
    document.addEventListener('keydown', (event) => this.key(event));
  }

  key(event) {
    const { store } = this;
    if (event.ctrlKey || event.metaKey || event.altKey || /INPUT|SELECT|TEXTAREA/.test(event.target.tagName)) {
      if (event.key === 'Escape') event.target.blur();
      return;
    }
    const layers = this.heat ? this.heat.rows.map((row) => this.heat.map.layers[row.layers[0]]) : [];
    const row = layers.indexOf(store.state.layer);
    const step = (by) => store.set({ step: Math.min(Math.max((store.state.step ?? store.window.last) + by, store.window.first), store.window.last) });
    const move = (by) => store.set({ layer: layers[Math.min(Math.max(row + by, 0), layers.length - 1)] });
    const keys = {
      n: () => stepThroughAlerts(store, 1), p: () => stepThroughAlerts(store, -1),
      ArrowLeft: () => step(-1), ArrowRight: () => step(1), ArrowUp: () => move(-1), ArrowDown: () => move(1),
      Escape: () => store.set({ first: null, last: null }), '/': () => document.getElementById('filter').focus(),
    };
    const onCanvas = event.target.tagName === 'CANVAS' || event.target === document.body;
    if (!keys[event.key] || (event.key.startsWith('Arrow') && !onCanvas)) return;
    event.preventDefault();
    keys[event.key]();
  }

  /** Asks which runs there are, and draws. */
  async refresh() {
    try {
      const overview = await this.source.overview();
      const before = this.seen;
      this.seen = overview.runs.map((run) => `${run.name}:${run.version}`).join();
      this.say(overview.runs.length ? '' : 'No record was found here yet. A run writes one with StabilityCallback().', 'runs');
      this.store.take(overview);
      if (this.seen !== before) await this.draw();
    } catch (error) {
      this.say(`The page could not be brought up to date: ${error.message}`, 'runs');
    }
  }

  /** Says what is wrong with the list of runs or with the picture, until that is well again. */
  say(text, about) {
    this.said = { ...this.said, [about]: text };
    const all = Object.values(this.said).filter(Boolean).join(' ');
    this.parts.message.textContent = all;
    this.parts.message.hidden = !all;
  }

  /** Draws everything that the state asks for; a later call makes an earlier one stop. */
  async draw() {
    const { store, parts, source } = this;
    const turn = ++this.turn;
    const { state } = store;
    if (!store.run || !store.part) return;
    drawVerdicts(parts.verdicts, store);
    drawAlerts(parts.alerts, store);
    drawControls(parts.controls, store);
    writeAddress(state);
    const { run, statistic } = state;
    const companion = state.companion || null;
    const width = parts.map.parentElement.clientWidth;
    const left = leftOf(store.part.layers, width);
    const plot = { left, width: Math.max(120, width - left - 14) };
    const columns = Math.min(900, Math.round(plot.width));
    const window = { first: state.first, last: state.last };
    try {
      const [lines, map, range, gate] = await Promise.all([
        source.ask('lines', { run, ...window, columns }),
        source.ask('map', { run, statistic, companion, ...window, columns }),
        store.colour === 'value' ? source.ask('range', { statistic, companion }) : {},
        source.ask('switch', { run, ...window, columns: 300 }),
      ]);
      if (turn !== this.turn) return;
      const definition = store.definition(statistic);
      const plain = definition.plain[0].toUpperCase() + definition.plain.slice(1);
      const how = {
        times: ', divided by its usual value', sigmas: ', \u03c3 (robust standard deviations) off its usual value',
        value: unitText(definition.unit),
      };
      parts.heading.replaceChildren(`${plain} of each ${state.companion ? 'row' : 'norm'}${how[store.colour]} `,
        element('small', {}, statistic, everyText(map.every)));
      const ends = { first: map.edges[0], end: map.edges[map.edges.length - 1] };
      this.axis = drawTimeline(parts.timeline, parts.lineLegend, store, lines, { ...plot, ...ends });
      this.heat = new HeatMap(parts.map, store, map, range, plot);
      this.heat.legend(parts.mapLegend);
      drawSwitch(parts.switch, store, gate, plot);
      const layer = map.layers.includes(state.layer) ? state.layer : map.layers[0];
      const card = await source.ask('layer', {
        run, statistic, companion, layer, step: state.step ?? store.window.last, ...window, columns: 250,
      });
      if (turn !== this.turn) return;
      drawLayer(parts.layer, store, card);
      this.say('', 'picture');
      document.body.dataset.drawn = String(Number(document.body.dataset.drawn || 0) + 1);
    } catch (error) {
      if (turn === this.turn) this.say(`This could not be shown: ${error.message}`, 'picture');
    }
  }
}

/** Reads the data of a report, which lie in the page itself. */
async function reportData() {
  const place = document.getElementById('stabnorm-data');
  if (!place) return null;
  const bytes = Uint8Array.from(atob(place.textContent.trim()), (letter) => letter.charCodeAt(0));
  const text = new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream('gzip'))).text();
  return JSON.parse(await text);
}

/** Starts the page; TensorBoard calls this. */
export async function render() {
  const data = await reportData();
  if (!data) {
    const css = await (await fetch('./style.css')).text();
    document.head.append(element('style', {}, css));
  }
  let page = null;
  followTheme(() => page && page.draw());
  page = new Page(data ? new ReportSource(data) : new ServerSource());
  await page.refresh();
  if (data) return;
  onReload(async () => {
    document.body.dataset.reloads = String(1 + Number(document.body.dataset.reloads || 0));
    await page.refresh();
  });
  setInterval(() => document.hidden || page.refresh(), EVERY);
}
