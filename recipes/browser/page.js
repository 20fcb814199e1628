// What the three pages share: random numbers, widgets, and how a page tells its state.
//
// form.html?3 is the form of seed 3. The title of a page is its goal; it becomes "reached" or
// "missed" when the goal can no longer change.
"use strict";

let state = Number(location.search.slice(1)) || 0;

// A random integer below n: the mulberry32 generator.
function random(n) {
    state = (state + 0x6d2b79f5) | 0;
    let t = Math.imul(state ^ (state >>> 15), state | 1);
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
    return Math.floor(((t ^ (t >>> 14)) >>> 0) / 4294967296 * n);
}

// The entries of a list in random order.
function shuffled(list) {
    const rest = [...list], found = [];
    while (rest.length) found.push(rest.splice(random(rest.length), 1)[0]);
    return found;
}

const LETTERS = [..."ABCDEFHKLMPR"];
const WORDS = ["OK", "NO", "GO", "UP", "ON", "IN", "AT", "BY", "DO", "HI", "ME", "MY"];
const COLORS = {
    red: "rgb(220, 30, 35)", green: "rgb(30, 150, 50)", blue: "rgb(40, 75, 230)",
    yellow: "rgb(240, 215, 30)", purple: "rgb(125, 40, 175)", orange: "rgb(245, 130, 20)",
    cyan: "rgb(25, 195, 215)", pink: "rgb(255, 120, 190)"};
const LIGHT = ["yellow", "orange", "cyan", "pink"];     // colours with black ink
const SHAPES = {
    circle: "circle(50%)", square: "inset(6%)",
    triangle: "polygon(50% 2%, 100% 95%, 0 95%)",
    diamond: "polygon(50% 0, 92% 50%, 50% 100%, 8% 50%)",
    cross: "polygon(34% 0, 66% 0, 66% 34%, 100% 34%, 100% 66%, 66% 66%, 66% 100%, 34% 100%, " +
           "34% 66%, 0 66%, 0 34%, 34% 34%)",
    star: "polygon(50% 0, 63% 36%, 100% 37%, 71% 60%, 82% 98%, 50% 76%, 18% 98%, 29% 60%, " +
          "0 37%, 37% 36%)"};

// Put an element of this tag at (x, y), in units, of its parent.
function place(tag, x, y, parent = document.body) {
    const element = parent.appendChild(document.createElement(tag));
    element.style.left = `calc(${x} * var(--u))`;
    element.style.top = `calc(${y} * var(--u))`;
    return element;
}

// Write a label into an element: a shape, or letters in cells of their own.
function write(element, label) {
    element.setAttribute("aria-label", label);
    if (label in SHAPES) {
        const icon = element.appendChild(document.createElement("i"));
        icon.style.clipPath = SHAPES[label];
    } else {
        for (const letter of label) {
            element.appendChild(document.createElement("span")).textContent = letter;
        }
    }
}

function button(label, color, x, y, parent) {
    const made = place("button", x, y, parent);
    made.style.background = COLORS[color];
    made.style.color = LIGHT.includes(color) ? "black" : "white";
    made.classList.toggle("icon", label in SHAPES);
    write(made, label);
    return made;
}

// A box to tick, with its label on the left.
function tickBox(label, x, y) {
    const text = place("span", x, y);
    text.className = "label";
    write(text, label);
    const made = place("input", x + 16, y);
    made.type = "checkbox";
    made.setAttribute("aria-label", label);
    return made;
}

// End the page.
function finish(reached) {
    document.title = reached ? "reached" : "missed";
}

// The action that clicks the middle of an element, in 0-999 of the page. It tests the page and the
// driver; a model never sees it.
function click(element) {
    const box = element.getBoundingClientRect();
    const x = Math.round((box.left + box.right) / 2 / innerWidth * 999);
    const y = Math.round((box.top + box.bottom) / 2 / innerHeight * 999);
    return `click(${x}, ${y})`;
}
