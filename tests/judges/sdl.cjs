// Judges a GraphQL schema by the reference implementation. Argument: the file.

const { readFileSync } = require("node:fs");
const { buildSchema, validateSchema } = require("graphql");

const faults = validateSchema(buildSchema(readFileSync(process.argv[2], "utf8")));
for (const fault of faults) {
  console.error(fault.message);
}
process.exitCode = faults.length === 0 ? 0 : 1;
