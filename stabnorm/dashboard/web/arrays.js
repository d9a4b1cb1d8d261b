// Arrays as they travel: base64 of little-endian float32, with their shape.

/**
 * @typedef {Object} Packed
 * @property {number[]} shape
 * @property {string} data
 */

/**
 * Reads a packed array.
 * @param {Packed} packed
 * @returns {{shape: number[], values: Float32Array}}
 */
export function unpack(packed) {
  const text = atob(packed.data);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  return { shape: packed.shape, values: new Float32Array(bytes.buffer) };
}

const isPacked = (value) => value && typeof value === 'object' && typeof value.data === 'string' && Array.isArray(value.shape);

/**
 * Unpacks all arrays of an answer, in place of their packed form.
 * @param {Object} answer
 * @returns {Object} the same answer; arrays are Float32Array, rows first: `values[column * rows + row]`.
 */
export function unpackAll(answer) {
  for (const [name, value] of Object.entries(answer)) {
    if (isPacked(value)) answer[name] = unpack(value).values;
    else if (value && typeof value === 'object' && !Array.isArray(value)) unpackAll(value);
  }
  return answer;
}

/**
 * Finds the column of a step.
 * @param {number[]} edges - first step of each column, and the end.
 * @param {number} step
 * @returns {number} -1 outside.
 */
export function columnOf(edges, step) {
  if (step < edges[0] || step >= edges[edges.length - 1]) return -1;
  return Math.floor((step - edges[0]) / (edges[1] - edges[0]));
}
