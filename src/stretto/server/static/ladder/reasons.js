/** The reasons for a ladder's choice of a variant, in words. */
const REASONS = {
  best: "no variant is better",
  deadline: "better variants would be late",
  floor: "better ones are below min_quality",
  load: "others gain more from the machine's time",
  explored: "it may be the best: rate it",
  below_floor: "none was predicted to keep deadline and quality",
  late: "none was predicted to be on time",
  moved: "the first choice would have been late",
  no_forecast: "the queues are not known yet",
};

export const reason = (name) => REASONS[name] ?? name;
