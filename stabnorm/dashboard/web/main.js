// Starts the page where no TensorBoard does it: `stabnorm view`.
import { render } from './index.js';

render();
