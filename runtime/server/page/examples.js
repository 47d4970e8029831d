// Requests to start with: those of examples/sprites/requests.

export const examples = [
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
export const examplesFor = (model) =>
  examples.filter(({ pictures }) => {
    const known = model.vocabulary?.labels;
    const named = ({ label }) => label.split(" ").some((word) => known.includes(word));
    return known !== undefined && pictures.length <= model.concepts.most && pictures.every(named);
  });
