# The overlay production on a cluster that is there already, with its own state: a provider can't plan against a cluster to be made.
# Its Secrets are made here; another overlay may need fewer. ../../README.md says how to apply it.

terraform {
  required_version = ">= 1.11"
}

provider "kubernetes" {
  config_path    = var.kubeconfig
  config_context = var.context
}

variable "kubeconfig" {
  description = "File with the cluster's address and credentials."
  type        = string
  default     = "~/.kube/config"
}

variable "context" {
  description = "Context of that file: named, so that nothing lands on the wrong cluster."
  type        = string
}

variable "manifests" {
  description = "File with what `kubectl kustomize` printed."
  type        = string

  validation {
    condition     = fileexists(var.manifests)
    error_message = "manifests must name a file."
  }
}

variable "keys" {
  description = "File with the gateway's API keys, as `tidewright keys` writes it."
  type        = string

  validation {
    condition     = fileexists(var.keys)
    error_message = "keys must name a file."
  }
}

variable "metrics_key" {
  description = "File with an API key of the role admin, as `tidewright keys create prometheus --role admin` prints it: Prometheus' own."
  type        = string

  validation {
    condition     = fileexists(var.metrics_key)
    error_message = "metrics_key must name a file."
  }
}

variable "redis_password" {
  description = "Password of Redis, such as `openssl rand -hex 32` makes: TF_VAR_redis_password keeps it out of the shell's history."
  type        = string
  ephemeral   = true

  validation {
    condition     = can(regex("^[A-Za-z0-9._~-]{16,}$", var.redis_password))
    error_message = "redis_password must be at least 16 letters, digits and . _ ~ -: it stands in a URL."
  }
}

variable "secrets_revision" {
  description = "To be raised when keys or password have changed."
  type        = number
  default     = 1
}

module "tidewright" {
  source = "../../modules/tidewright"

  manifests        = file(var.manifests)
  secret_names     = ["tidewright-keys", "tidewright-metrics", "tidewright-redis"]
  secrets_revision = var.secrets_revision
  secrets = {
    tidewright-keys    = { "keys.yaml" = file(var.keys) }
    tidewright-metrics = { key = trimspace(file(var.metrics_key)) }
    tidewright-redis   = { password = var.redis_password }
  }
}

output "objects" {
  description = "What was applied."
  value       = module.tidewright.objects
}
