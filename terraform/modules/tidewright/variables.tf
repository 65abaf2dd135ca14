variable "manifests" {
  description = "What `kubectl kustomize k8s/overlays/OVERLAY` printed: one text of YAML documents."
  type        = string

  validation {
    condition     = can([for document in split("\n---\n", trimspace(var.manifests)) : yamldecode(document).metadata.name])
    error_message = "manifests must be YAML documents, each an object of Kubernetes with a name."
  }

  validation {
    condition     = try(length([for document in split("\n---\n", trimspace(var.manifests)) : document if yamldecode(document).kind == "Namespace"]), 0) == 1
    error_message = "manifests must hold one Namespace, as every overlay does."
  }
}

variable "secrets" {
  description = "Secrets by name, each a map of keys to values: tidewright-keys with keys.yaml; which others, the overlay says. They do not enter the state."
  type        = map(map(string))
  ephemeral   = true

  validation {
    condition     = alltrue([for name, content in var.secrets : can(regex("^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$", name)) && length(content) > 0])
    error_message = "Each secret must have a name of lower-case letters, digits, hyphens and dots, and at least one value."
  }
}

variable "secret_names" {
  description = "Names of the secrets, which may be known."
  type        = set(string)
  default     = ["tidewright-keys"]

  validation {
    condition     = length(var.secret_names) > 0
    error_message = "secret_names must have at least one name."
  }
}

variable "secrets_revision" {
  description = "To be raised when a secret's value has changed: Terraform does not see it."
  type        = number
  default     = 1

  validation {
    condition     = var.secrets_revision >= 1 && floor(var.secrets_revision) == var.secrets_revision
    error_message = "secrets_revision must be a whole number from 1 on."
  }
}
