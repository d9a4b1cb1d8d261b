// Saves what is seen: the map as a picture, the numbers as a table.
import { element } from './dom.js';

function save(name, address) {
  const link = element('a', { download: name, href: address });
  document.body.append(link);
  link.click();
  link.remove();
}

const fileName = (text) => text.replace(/[^\w.-]+/g, '_').slice(0, 80);

/**
 * Saves timeline and map as one PNG.
 * @param {HTMLCanvasElement[]} canvases - one below the other.
 * @param {import('./state.js').Store} store
 */
export function savePicture(canvases, store) {
  const whole = document.createElement('canvas');
  whole.width = Math.max(...canvases.map(({ width }) => width));
  whole.height = canvases.reduce((sum, { height }) => sum + height, 0);
  const context = whole.getContext('2d');
  context.fillStyle = getComputedStyle(document.documentElement).getPropertyValue('--panel');
  context.fillRect(0, 0, whole.width, whole.height);
  let top = 0;
  for (const canvas of canvases) {
    context.drawImage(canvas, 0, top);
    top += canvas.height;
  }
  whole.toBlob((blob) => {
    const address = URL.createObjectURL(blob);
    save(`${fileName(store.state.run)}_${store.state.statistic}.png`, address);
    setTimeout(() => URL.revokeObjectURL(address), 1000);
  });
}

const quoted = (text) => {
  const safe = /^[=+\-@]/.test(text) ? `'${text}` : text; // a spreadsheet would run it as a formula
  return /[",\r\n]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
};

/**
 * Saves the numbers: every step from a server, the columns of the map from a report.
 * @param {Object} map - the answer to `map`.
 * @param {import('./state.js').Store} store
 * @param {Object} source
 */
export async function saveTable(map, store, source) {
  const { run, statistic, companion } = store.state;
  const name = `${fileName(run)}_${statistic}.csv`;
  if (source.live) {
    const { first, last } = store.window;
    save(name, source.address('csv', { run, statistic, companion: companion || null, first, last }));
    return;
  }
  const count = map.layers.length;
  const lines = [['step', ...map.layers].map(quoted).join()];
  for (let column = 0; column < map.edges.length - 1; column++) {
    lines.push([map.edges[column], ...map.value.slice(column * count, (column + 1) * count)].join());
  }
  const address = URL.createObjectURL(new Blob([lines.join('\r\n')], { type: 'text/csv' }));
  save(name, address);
  setTimeout(() => URL.revokeObjectURL(address), 1000);
}
