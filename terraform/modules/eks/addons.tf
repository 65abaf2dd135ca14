# What the manifests need of the cluster: volumes, network policies that are enforced, and the CPU of pods for autoscaling.

# Without the switch, policies are accepted and nothing is denied.
resource "aws_eks_addon" "network" {
  cluster_name                = aws_eks_cluster.this.name
  addon_name                  = "vpc-cni"
  resolve_conflicts_on_create = "OVERWRITE" # EKS has put it there already
  configuration_values        = jsonencode({ enableNetworkPolicy = "true" })
}

data "aws_iam_policy_document" "storage" {
  statement {
    actions = ["sts:AssumeRole", "sts:TagSession"]
    principals {
      type        = "Service"
      identifiers = ["pods.eks.amazonaws.com"]
    }
  }
}

resource "aws_iam_role" "storage" {
  name               = "${var.name}-storage"
  assume_role_policy = data.aws_iam_policy_document.storage.json
}

resource "aws_iam_role_policy_attachment" "storage" {
  role       = aws_iam_role.storage.name
  policy_arn = "arn:${data.aws_partition.here.partition}:iam::aws:policy/service-role/AmazonEBSCSIDriverPolicy"
}

resource "aws_eks_addon" "plain" {
  for_each = toset(["eks-pod-identity-agent", "metrics-server"])

  cluster_name = aws_eks_cluster.this.name
  addon_name   = each.value

  depends_on = [aws_eks_node_group.system]
}

# EKS has neither a driver for volumes nor a default StorageClass.
resource "aws_eks_addon" "storage" {
  cluster_name         = aws_eks_cluster.this.name
  addon_name           = "aws-ebs-csi-driver"
  configuration_values = jsonencode({ defaultStorageClass = { enabled = true } })

  pod_identity_association {
    role_arn        = aws_iam_role.storage.arn
    service_account = "ebs-csi-controller-sa"
  }

  depends_on = [aws_eks_addon.plain, aws_iam_role_policy_attachment.storage]
}
