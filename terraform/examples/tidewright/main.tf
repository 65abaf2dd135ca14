# An overlay on a cluster that is there already, with its own state: a provider can't plan against a cluster to be made.
#   kubectl kustomize k8s/overlays/production > manifests.yaml
#   terraform apply -var manifests=manifests.yaml -var keys=keys.yaml

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

variable "redis_password" {
  description = "Password of Redis, if the overlay has it."
  type        = string
  ephemeral   = true
  default     = ""
}

variable "secrets_revision" {
  description = "To be raised when keys or password have changed."
  type        = number
  default     = 1
}

module "tidewright" {
  source = "../../modules/tidewright"

  manifests        = file(var.manifests)
  secret_names     = ["tidewright-keys", "tidewright-redis"]
  secrets_revision = var.secrets_revision
  secrets = {
    tidewright-keys  = { "keys.yaml" = file(var.keys) }
    tidewright-redis = { password = var.redis_password }
  }
}

output "objects" {
  description = "What was applied."
  value       = module.tidewright.objects
}
