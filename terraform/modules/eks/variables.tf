variable "name" {
  description = "Name of the cluster, and beginning of all other names."
  type        = string

  validation {
    condition     = can(regex("^[a-z][a-z0-9-]{0,38}[a-z0-9]$", var.name))
    error_message = "name must be 2 to 40 lower-case letters, digits and hyphens, beginning with a letter."
  }
}

variable "kubernetes_version" {
  description = "Kubernetes minor version, such as 1.35."
  type        = string
  default     = "1.35"

  validation {
    condition     = can(regex("^1\\.(29|[3-9][0-9])$", var.kubernetes_version))
    error_message = "kubernetes_version must be 1.29 or later, without a patch level."
  }
}

variable "subnet_ids" {
  description = "Private subnets in at least two zones, with a way to the internet or to a registry of images and models."
  type        = list(string)

  validation {
    condition     = length(var.subnet_ids) >= 2 && alltrue([for id in var.subnet_ids : startswith(id, "subnet-")])
    error_message = "subnet_ids must name at least two subnets."
  }
}

variable "kms_key_arn" {
  description = "KMS key that encrypts the cluster's Secrets."
  type        = string

  validation {
    condition     = can(regex("^arn:[a-z-]+:kms:", var.kms_key_arn))
    error_message = "kms_key_arn must be the ARN of a KMS key."
  }
}

variable "gpu_instance_type" {
  description = "Instance type of the GPU nodes: g6.2xlarge has one L4, p5.48xlarge eight H100, p5en.48xlarge eight H200. g6.xlarge is too small for the overlays."
  type        = string
  default     = "g6.2xlarge"

  validation {
    condition     = can(regex("^(g4dn|g5|g6|g6e|p4d|p4de|p5|p5e|p5en|p6-b200)\\.[0-9]*x?large$", var.gpu_instance_type))
    error_message = "gpu_instance_type must be an instance type with NVIDIA GPUs, such as g6.2xlarge or p5.48xlarge."
  }
}

variable "gpu_nodes" {
  description = "GPU nodes: how many, and how far a cluster autoscaler may go. modules/sizing says how many a load needs."
  type        = object({ min = number, desired = number, max = number })
  default     = { min = 1, desired = 1, max = 4 }

  validation {
    condition     = var.gpu_nodes.min >= 0 && var.gpu_nodes.min <= var.gpu_nodes.desired && var.gpu_nodes.desired <= var.gpu_nodes.max && var.gpu_nodes.max >= 1
    error_message = "gpu_nodes must have 0 <= min <= desired <= max, and a max of at least 1."
  }
}

variable "gpu_disk_gib" {
  description = "Disk of a GPU node in GiB, for images and the model cache."
  type        = number
  default     = 200

  validation {
    condition     = var.gpu_disk_gib >= 50 && var.gpu_disk_gib <= 16384
    error_message = "gpu_disk_gib must be 50 to 16384."
  }
}

variable "system_instance_type" {
  description = "Instance type of the two nodes without GPUs, for gateways and the cluster's own pods."
  type        = string
  default     = "m7i.xlarge"

  validation {
    condition     = can(regex("^[a-z0-9-]+\\.[a-z0-9-]+$", var.system_instance_type))
    error_message = "system_instance_type must be an instance type, such as m7i.xlarge."
  }
}
