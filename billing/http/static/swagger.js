// Opens the document in Swagger UI; a file of its own, because the page's policy allows no inline script.

const dark = window.matchMedia("(prefers-color-scheme: dark)");

function paint() {
  document.documentElement.classList.toggle("dark-mode", dark.matches);
}

async function open() {
  const answer = await fetch("/openapi.json");
  if (!answer.ok) throw new Error(`/openapi.json answered ${answer.status}`);
  const spec = await answer.json();
  // The page may be open under another name than the public one (localhost, say), and may call its own origin only.
  spec.servers = [{ url: window.location.origin, description: "This server" }];
  // An example is filled in: every call would bear the same Idempotency-Key, and a callback an error beside its code.
  for (const parameter of Object.values(spec.components.parameters)) {
    delete parameter.example;
    delete parameter.schema.example;
  }
  window.ui = SwaggerUIBundle({
    spec,
    dom_id: "#swagger-ui",
    layout: "BaseLayout",
    deepLinking: true,
    // Neither a token nor a key is left behind in the browser's storage.
    persistAuthorization: false,
    displayRequestDuration: true,
    displayOperationId: true,
    tryItOutEnabled: true,
    filter: false,
    validatorUrl: null,
    defaultModelsExpandDepth: 0,
  });
}

paint();
dark.addEventListener("change", paint);
open().catch((error) => {
  document.getElementById("swagger-ui").textContent = `The document could not be opened: ${error.message}`;
});
