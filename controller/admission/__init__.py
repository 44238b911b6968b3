"""Admission: each kind's defaulting and validation, served to the API server over TLS.

Who owns a kind provides one value, `ADMISSION`, in a module `admission.py` of the kind's room (pools and reserved
addresses have theirs here), and one line in `controller.admission.table`. It is a `controller.admission.rules.Rules`:

    async def default(new: Subnet, old: Subnet | None, context: Context) -> Subnet
        `new` with what is missing filled in. It never refuses: what cannot be derived stays absent. Raises StoreError
        only if it has to read and cannot.

    async def validate(new: Subnet, old: Subnet | None, context: Context) -> Verdict
        A list of FieldErrors (empty: admitted), or a Denial. `old` is None for a creation; `new` has been defaulted.

    async def validate_deletion(old: Subnet, context: Context) -> Verdict
        Optional.

They gather what they need from `context.store`, which is not cached, and leave the decision to pure functions in
`api/validate/<kind>.py`. The store's errors go up: the request is then refused with "try again".

Pods are only mutated and never decoded: `controller.admission.rules.Injection` takes and returns their JSON.
"""
