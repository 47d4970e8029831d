// Requests to start with: those of examples/stickers/requests, for models that any word will do for, and
// those of examples/sprites/requests.

const anyWord = [
  {
    prompt: "a panda on the left jumps and a sunflower on the right grows, in a meadow",
    seed: 7,
    pictures: [
      { label: "panda", path: "example-panda.png" },
      { label: "sunflower", path: "example-sunflower.png" },
    ],
  },
  {
    prompt: "the first tulip on the left jumps and the second tulip on the right moves up, in the snow",
    seed: 1,
    pictures: [
      { label: "first tulip", path: "example-tulip-1.png" },
      { label: "second tulip", path: "example-tulip-2.png" },
    ],
  },
  {
    prompt: "a plorf on the left spins and a quindle on the right moves down, under a night sky",
    seed: 3,
    pictures: [
      { label: "plorf", path: "example-plorf.png" },
      { label: "quindle", path: "example-quindle.png" },
    ],
  },
  {
    prompt:
      "an elephant on the left stays still, a bus at the bottom right moves up and a guitar at the top " +
      "moves right, on a beach",
    seed: 2,
    pictures: [
      { label: "elephant", path: "example-elephant.png" },
      { label: "bus", path: "example-bus.png" },
      { label: "guitar", path: "example-guitar.png" },
    ],
  },
];

const sprites = [
  {
    prompt: "a flower in the middle moves down and a rocket on the left moves up, at sunset",
    seed: 5,
    pictures: [
      { label: "flower", path: "example-flower.png" },
      { label: "rocket", path: "example-rocket.png" },
    ],
  },
  {
    prompt: "the second ghost at the top moves down and the first ghost on the right moves up, in the hills",
    seed: 6,
    pictures: [
      { label: "second ghost", path: "example-ghost-2.png" },
      { label: "first ghost", path: "example-ghost-1.png" },
    ],
  },
  {
    prompt:
      "a rocket at the bottom left jumps, a flower at the bottom moves right and a car in the middle stays still, " +
      "on a checkered floor",
    seed: 0,
    pictures: [
      { label: "rocket", path: "example-three-rocket.png" },
      { label: "flower", path: "example-three-flower.png" },
      { label: "car", path: "example-three-car.png" },
    ],
  },
];

// Those that a model can make.
export function examplesFor({ vocabulary, concepts }) {
  if (!vocabulary) return [];
  const named = ({ label }) => label.split(" ").some((word) => vocabulary.labels.includes(word));
  const known = vocabulary.open ? anyWord : sprites.filter(({ pictures }) => pictures.every(named));
  return known.filter(({ pictures }) => pictures.length <= concepts.most);
}
