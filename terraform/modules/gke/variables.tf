variable "project" {
  description = "Project that holds the cluster."
  type        = string

  validation {
    condition     = can(regex("^[a-z][a-z0-9-]{4,28}[a-z0-9]$", var.project))
    error_message = "project must be a project id: 6 to 30 lower-case letters, digits and hyphens."
  }
}

variable "name" {
  description = "Name of the cluster, and beginning of all other names."
  type        = string

  validation {
    condition     = can(regex("^[a-z][a-z0-9-]{0,17}[a-z0-9]$", var.name))
    error_message = "name must be 2 to 19 lower-case letters, digits and hyphens, beginning with a letter."
  }
}

variable "region" {
  description = "Region of the cluster, such as us-central1."
  type        = string

  validation {
    condition     = can(regex("^[a-z]+-[a-z]+[0-9]+$", var.region))
    error_message = "region must be a region such as us-central1, not a zone."
  }
}

variable "zones" {
  description = "Zones of the nodes: those of the region that have the GPU."
  type        = list(string)

  validation {
    condition     = length(var.zones) >= 1 && alltrue([for zone in var.zones : startswith(zone, "${var.region}-")])
    error_message = "zones must name at least one zone of the region."
  }
}

variable "network" {
  description = "VPC network and its subnetwork, with the names of the subnetwork's secondary ranges for pods and services."
  type        = object({ network = string, subnetwork = string, pods_range = string, services_range = string })

  validation {
    condition     = alltrue([for name in values(var.network) : length(name) > 0])
    error_message = "network must name a network, a subnetwork and its two secondary ranges."
  }
}

variable "control_plane_cidr" {
  description = "A /28 of private addresses for the control plane."
  type        = string
  default     = "172.16.0.0/28"

  validation {
    condition     = can(cidrhost(var.control_plane_cidr, 0)) && endswith(var.control_plane_cidr, "/28")
    error_message = "control_plane_cidr must be a /28, such as 172.16.0.0/28."
  }
}

variable "authorized_cidr" {
  description = "Addresses that may reach the cluster's API."
  type        = string

  validation {
    condition     = can(cidrhost(var.authorized_cidr, 0)) && var.authorized_cidr != "0.0.0.0/0"
    error_message = "authorized_cidr must be a CIDR, and not all addresses."
  }
}

variable "gpu" {
  description = "GPU nodes: machine type, GPU type and GPUs per node, which must fit each other."
  type        = object({ machine_type = string, type = string, count = number })
  default     = { machine_type = "g2-standard-8", type = "nvidia-l4", count = 1 }

  validation {
    condition     = startswith(var.gpu.type, "nvidia-") && contains([1, 2, 4, 8, 16], var.gpu.count)
    error_message = "gpu.type must be a GPU's name such as nvidia-l4, and gpu.count 1, 2, 4, 8 or 16."
  }
}

variable "gpu_nodes" {
  description = "GPU nodes over all zones, at least and at most. modules/sizing says how many a load needs."
  type        = object({ min = number, max = number })
  default     = { min = 1, max = 4 }

  validation {
    condition     = var.gpu_nodes.min >= 0 && var.gpu_nodes.min <= var.gpu_nodes.max && var.gpu_nodes.max >= 1
    error_message = "gpu_nodes must have 0 <= min <= max, and a max of at least 1."
  }
}

variable "gpu_disk_gb" {
  description = "Disk of a GPU node in GB, for images and the model cache."
  type        = number
  default     = 200

  validation {
    condition     = var.gpu_disk_gb >= 50 && var.gpu_disk_gb <= 65536
    error_message = "gpu_disk_gb must be 50 to 65536."
  }
}

variable "system_machine_type" {
  description = "Machine type of the nodes without GPUs, for gateways and the cluster's own pods."
  type        = string
  default     = "e2-standard-4"

  validation {
    condition     = can(regex("^[a-z0-9]+-[a-z0-9-]+$", var.system_machine_type))
    error_message = "system_machine_type must be a machine type, such as e2-standard-4."
  }
}
