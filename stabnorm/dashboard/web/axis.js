// The axis of steps that timeline and map share: places, ticks, marks, and dragging to zoom.
import { stepText, ticks } from './dom.js';
import { themeColours } from './colours.js';

export const RIGHT = 14; // pixels that stay free at the right

/** Turns steps into pixels and back. */
export class Axis {
  /**
   * @param {number} left - in pixels.
   * @param {number} width - of the plot, in pixels.
   * @param {number} first - first step that is shown.
   * @param {number} end - the step after the last one.
   */
  constructor(left, width, first, end) {
    Object.assign(this, { left, width, first, end: Math.max(end, first + 1) });
  }

  x(step) {
    return this.left + (step - this.first) / (this.end - this.first) * this.width;
  }

  step(x) {
    const inside = Math.min(Math.max(x - this.left, 0), this.width - 1e-6);
    return Math.floor(this.first + inside / this.width * (this.end - this.first));
  }

  /** Draws the ticks below a plot. */
  draw(context, bottom) {
    const colours = themeColours();
    context.fillStyle = colours.faint;
    context.textBaseline = 'top';
    context.textAlign = 'right';
    context.fillText('step', this.left - 6, bottom + 4);
    for (const tick of ticks(this.first, this.end - 1, Math.max(2, Math.floor(this.width / 90)))) {
      if (tick !== Math.round(tick)) continue;
      const text = stepText(tick);
      const half = context.measureText(text).width / 2;
      context.textAlign = 'left';
      context.fillText(text, Math.min(this.x(tick + 0.5) - half, this.left + this.width - 2 * half + 10), bottom + 4);
    }
  }

  /** Draws a line at a step, through the middle of its place. */
  mark(context, step, top, bottom, colour, dashes = []) {
    if (step < this.first || step >= this.end) return;
    const x = Math.round(this.x(step + 0.5)) + 0.5;
    context.save();
    context.strokeStyle = colour;
    context.setLineDash(dashes);
    context.beginPath();
    context.moveTo(x, top);
    context.lineTo(x, bottom);
    context.stroke();
    context.restore();
  }
}

/**
 * Lets the reader drag over a canvas to zoom, click to pin, and click twice to see everything again.
 * @param {HTMLCanvasElement} canvas
 * @param {import('./state.js').Store} store
 * @param {function(): Axis} axis - as it was last drawn.
 * @param {function(number, MouseEvent): void} pin - called with the step that was clicked.
 */
export function zoomable(canvas, store, axis, pin) {
  let from = null;
  const veil = document.createElement('div');
  veil.className = 'veil';
  const place = (event) => event.clientX - canvas.getBoundingClientRect().left;
  canvas.addEventListener('pointerdown', (event) => {
    if (event.button || !axis() || place(event) < axis().left) return;
    from = place(event);
    canvas.setPointerCapture(event.pointerId);
    canvas.parentElement.append(veil);
  });
  canvas.addEventListener('pointermove', (event) => {
    if (from === null) return;
    const [low, high] = [from, place(event)].sort((a, b) => a - b);
    Object.assign(veil.style, {
      left: `${canvas.offsetLeft + low}px`, width: `${high - low}px`, top: `${canvas.offsetTop}px`, height: `${canvas.clientHeight}px`,
    });
  });
  canvas.addEventListener('pointerup', (event) => {
    if (from === null) return;
    const [low, high] = [from, place(event)].sort((a, b) => a - b);
    from = null;
    veil.remove();
    veil.style.width = '0';
    if (high - low > 4) store.set({ first: axis().step(low), last: Math.max(axis().step(high), axis().step(low) + 1) });
    else pin(axis().step(high), event);
  });
  canvas.addEventListener('dblclick', () => store.set({ first: null, last: null }));
}
