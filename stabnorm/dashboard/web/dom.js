// Makes elements, and writes numbers. All text goes through `textContent`, so a layer's name is never read as HTML.

/**
 * Makes an element.
 * @param {string} tag
 * @param {Object} properties - attributes by name; `on` holds listeners, `class` is the class, `data` the data set.
 * @param {...(Node|string)} children
 * @returns {HTMLElement}
 */
export function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name === 'on') Object.entries(value).forEach(([type, listener]) => made.addEventListener(type, listener));
    else if (name === 'class') made.className = value;
    else if (name === 'data') Object.assign(made.dataset, value);
    else if (value === true) made.setAttribute(name, '');
    else if (value !== false && value !== null && value !== undefined) made.setAttribute(name, String(value));
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

/**
 * Writes a number with three digits, as Python's side does.
 * @param {number|string} value
 * @returns {string}
 */
export function number(value) {
  const x = Number(value);
  if (Number.isNaN(x)) return 'NaN';
  if (!Number.isFinite(x)) return x > 0 ? 'infinite' : '-infinite';
  if (x === 0) return '0';
  const size = Math.abs(x);
  if (size >= 999.5 && size < 1e6) return Math.round(x).toLocaleString('en');
  if (size < 1e-4 || size >= 1e6) return x.toExponential(2).replace('e+', 'e').replace(/\.?0+e/, 'e');
  return String(Number(x.toPrecision(3)));
}

/**
 * Writes a step with separators.
 * @param {number} step
 * @returns {string}
 */
export function stepText(step) {
  return Math.round(step).toLocaleString('en');
}

/**
 * Shows control characters of a name, and keeps it on one line.
 * @param {string} name
 * @returns {string}
 */
export function visible(name) {
  return name.replace(/[\u0000-\u001f\u007f\u200b-\u200f\u202a-\u202e\u2066-\u2069]/g, (c) =>
    c === '\n' ? '\u23ce' : '\ufffd');
}

/**
 * Counts the letters that all names have in front, up to a dot: they tell nothing, and need not be shown.
 * @param {string[]} names
 * @returns {number}
 */
export function shared(names) {
  if (names.length < 2) return 0;
  let length = names[0].lastIndexOf('.') + 1;
  for (const name of names) {
    while (length && !name.startsWith(names[0].slice(0, length))) length = names[0].lastIndexOf('.', length - 2) + 1;
  }
  return length;
}

/**
 * Cuts the middle out of a name until it fits.
 * @param {CanvasRenderingContext2D} context - with its font set.
 * @param {string} name
 * @param {number} width - in pixels.
 * @returns {string}
 */
export function fitted(context, name, width) {
  const text = visible(name);
  if (context.measureText(text).width <= width) return text;
  const letters = [...text];
  for (let kept = Math.min(letters.length - 1, 60); kept > 4; kept--) {
    const tail = Math.ceil(kept * 0.6);
    const short = letters.slice(0, kept - tail).join('') + '\u2026' + letters.slice(-tail).join('');
    if (context.measureText(short).width <= width) return short;
  }
  return letters.slice(0, 3).join('') + '\u2026';
}

/**
 * Writes a text on the panel's own colour, so that it can be read above curves.
 * @param {CanvasRenderingContext2D} context - with font, alignment to the left or right, and baseline "top".
 * @param {string} text
 * @param {number} x
 * @param {number} y
 * @param {string} colour
 * @param {string} ground
 */
export function writeOn(context, text, x, y, colour, ground) {
  const width = context.measureText(text).width;
  context.fillStyle = ground;
  context.globalAlpha = 0.8;
  context.fillRect(context.textAlign === 'right' ? x - width : x, y - 1, width, 13);
  context.globalAlpha = 1;
  context.fillStyle = colour;
  context.fillText(text, x, y);
}

/**
 * Cuts the middle out of a long name.
 * @param {string} name
 * @param {number} most - letters.
 * @returns {string}
 */
export function shortName(name, most = 60) {
  const letters = [...visible(name)];
  if (letters.length <= most) return letters.join('');
  const tail = Math.ceil(most * 0.6);
  return `${letters.slice(0, most - tail - 1).join('')}\u2026${letters.slice(-tail).join('')}`;
}

/**
 * Says how often a statistic was measured that a budget spared.
 * @param {number[]|null} every - least and most steps between two measurements.
 */
export function everyText(every) {
  if (!every) return '';
  const [least, most] = every;
  const steps = least === most ? `${stepText(most)}` : `${stepText(least)} to ${stepText(most)}`;
  return ` (measured once in ${steps} steps; the last value stands in between)`;
}

/** Says in which unit a statistic is; a plain number has none, and "x" is that of the layer's own input. */
export const unitText = (unit) => (unit && unit !== '1' ? `, in ${unit === 'x' ? 'the unit of the input' : unit}` : '');

/** The number of something, in words: `counted(1, 'layer')` is "1 layer". */
export const counted = (count, word) => `${stepText(count)} ${word}${count === 1 ? '' : 's'}`;

/**
 * Makes a canvas sharp on any display, and gives its context in CSS pixels.
 * @param {HTMLCanvasElement} canvas
 * @param {number} width
 * @param {number} height
 * @returns {CanvasRenderingContext2D}
 */
export function sharp(canvas, width, height) {
  const ratio = window.devicePixelRatio || 1;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  canvas.style.width = `${width}px`;
  canvas.style.height = `${height}px`;
  const context = canvas.getContext('2d');
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.font = '11px system-ui, sans-serif';
  return context;
}

/**
 * Picks round numbers between two ends.
 * @param {number} low
 * @param {number} high
 * @param {number} most
 * @returns {number[]}
 */
export function ticks(low, high, most = 8) {
  const span = high - low;
  if (!(span > 0)) return [low];
  const power = 10 ** Math.floor(Math.log10(span / most));
  const gap = [1, 2, 5, 10].map((factor) => factor * power).find((size) => span / size <= most);
  const all = [];
  for (let at = Math.ceil(low / gap) * gap; at <= high + gap * 1e-9; at += gap) all.push(at);
  return all;
}
