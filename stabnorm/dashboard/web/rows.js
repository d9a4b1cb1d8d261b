// Which rows the map has: the layers, in depth order or worst first, filtered, and grouped into blocks where they are many.

export const MOST = 60; // rows; beyond them the layers of a block share one

/**
 * @typedef {Object} Row
 * @property {string} name
 * @property {number[]} layers - indices of the layers that share the row.
 * @property {string|null} block - the name of the block that the row stands for, or belongs to.
 */

/** The number in every cell: how far the value is from what was usual, or the value itself. */
export function cellValue(map, kind, at) {
  if (kind === 'value') return map.value[at];
  if (kind === 'sigmas') return Math.log(map.value[at] / map.usual[at]) / map.scale[at];
  const times = map.value[at] / map.usual[at];
  return times >= 0 ? times : NaN; // a value of another sign is no multiple of what is usual
}

const blockOf = (name) => {
  const numbered = /^(.*?\.\d+)(\.|$)/.exec(name);
  return numbered ? numbered[1] : name.split('.').slice(0, -1).join('.') || name;
};

/**
 * Chooses the rows.
 * @param {Object} map - the answer to `map`.
 * @param {import('./state.js').State} state
 * @param {function(number): number} rank - how far a cell's number is from calm.
 * @returns {Row[]}
 */
export function rowsOf(map, state, rank) {
  const wanted = state.filter.toLowerCase();
  let shown = map.layers.map((_, i) => i).filter((i) => map.layers[i].toLowerCase().includes(wanted));
  if (state.order === 'worst') {
    const count = map.layers.length;
    const worst = map.layers.map((_, layer) => {
      let most = -Infinity;
      for (let at = layer; at < map.value.length; at += count) {
        if (map.lost[at] || map.high[at] === Infinity) return Infinity;
        const far = rank(cellValue(map, state.colour, at));
        if (far > most) most = far;
      }
      return most;
    });
    shown.sort((a, b) => (worst[a] === worst[b] ? a - b : worst[b] - worst[a]));
  }
  if (shown.length <= MOST || state.order === 'worst') {
    shown = shown.slice(0, Math.max(MOST, state.order === 'worst' ? MOST : shown.length));
    return shown.map((i) => ({ name: map.layers[i], layers: [i], block: null }));
  }
  const blocks = new Map();
  for (const i of shown) {
    const block = blockOf(map.layers[i]);
    blocks.set(block, [...(blocks.get(block) || []), i]);
  }
  return [...blocks].flatMap(([block, layers]) => (state.open.has(block) || layers.length === 1
    ? layers.map((i) => ({ name: map.layers[i], layers: [i], block: layers.length > 1 ? block : null }))
    : [{ name: `${block} (${layers.length})`, layers, block }]));
}

/**
 * The cell of a row and column: of several layers the one that is furthest from calm.
 * @returns {number} an index into the map's arrays.
 */
export function cellOf(map, row, column, kind, rank) {
  const count = map.layers.length;
  let best = column * count + row.layers[0], most = -Infinity;
  if (row.layers.length === 1) return best;
  for (const layer of row.layers) {
    const at = column * count + layer;
    const far = map.lost[at] || map.high[at] === Infinity ? Infinity : rank(cellValue(map, kind, at));
    if (far > most) { most = far; best = at; }
  }
  return best;
}
